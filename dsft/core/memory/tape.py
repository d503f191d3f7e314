"""A tape of allocations: what is alive when, and how much that is at most."""

from dataclasses import dataclass, field

from dsft.core.memory.model_shape import in_blocks


@dataclass(frozen=True)
class Segment:
    """What a part of a step adds to the memory it begins with.

    Attributes:
        peak_bytes: Most at once, above the beginning.
        kept_bytes: What it leaves behind, for the backward pass (may be negative: what it frees).
    """

    peak_bytes: int
    kept_bytes: int


@dataclass
class Tape:
    """Counts the bytes alive while tensors come and go, in the order a computation makes and drops them.

    Attributes:
        live_bytes: Alive now.
        peak_bytes: Most that was alive at once.
    """

    live_bytes: int = 0
    peak_bytes: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)

    def make(self, name: str, num_bytes: int) -> None:
        """Begin a tensor's life.

        Raises:
            ValueError: A tensor of that name is alive: the computation is written down wrongly.
        """
        if name in self._sizes:
            raise ValueError(f"{name} is alive already")
        self._sizes[name] = in_blocks(num_bytes)
        self.live_bytes += self._sizes[name]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def drop(self, *names: str) -> None:
        """End tensors' lives."""
        for name in names:
            self.live_bytes -= self._sizes.pop(name)

    def drop_if_there(self, *names: str) -> None:
        """End the lives of those tensors that are alive."""
        self.drop(*(name for name in names if name in self._sizes))

    def rename(self, old: str, new: str) -> None:
        """Give a tensor that is alive another name.

        Raises:
            ValueError: A tensor of the new name is alive.
        """
        if new in self._sizes:
            raise ValueError(f"{new} is alive already")
        self._sizes[new] = self._sizes.pop(old)

    def alive(self) -> dict[str, int]:
        """Return the bytes of every tensor that is alive."""
        return dict(self._sizes)
