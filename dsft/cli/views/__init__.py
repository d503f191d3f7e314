"""Result dataclass in, Rich renderable out: pure functions. Only `progress` draws by itself, from a thread."""
