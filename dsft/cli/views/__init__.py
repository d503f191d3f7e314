"""Result dataclass in, Rich renderable out; pure functions."""
