"""Result dataclass in, Rich renderable out: pure functions. Only `progress` draws by itself, and owns a thread for it."""
