"""What GPUs there are to plan for: their memory, what the driver and CUDA take of it, and how fast they are.

Memory and rates are the manufacturers' (NVIDIA's data sheets and architecture papers; dense bf16 products with float32
sums, without sparsity). What CUDA takes was measured where `is_measured` says so; elsewhere it is scaled from the
measured card by the number of multiprocessors, whose stacks and buffers make up most of it.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from dsft.core.errors import ConfigError
from dsft.core.units import GIB

MIB = 1024**2

KERNELS_BYTES = 140 * MIB
"""Kernels that a run loads beside the bare CUDA context (cuBLAS, attention, bitsandbytes), measured on an H100."""


@dataclass(frozen=True)
class Card:
    """A GPU model.

    Attributes:
        name: As the driver names it, without the maker.
        total_bytes: Memory the driver reports in all.
        driver_bytes: What of it the driver keeps, whatever runs.
        context_bytes: What a process with a CUDA context takes beside its tensors, kernels included.
        capability: CUDA compute capability.
        multiprocessors: Streaming multiprocessors.
        matmul_flops: Dense bf16 (older cards: fp16) products with float32 sums, in FLOP/s.
        bandwidth: Memory bandwidth in bytes/s.
        is_measured: Whether `driver_bytes` and `context_bytes` were measured.
    """

    name: str
    total_bytes: int
    driver_bytes: int
    context_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    matmul_flops: float
    bandwidth: float
    is_measured: bool = False

    @property
    def usable_bytes(self) -> int:
        """Memory that processes can have."""
        return self.total_bytes - self.driver_bytes


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Return what cuBLAS keeps for the forward and the backward thread.

    PyTorch's default is 32 MiB each on Hopper and later data-centre cards, 8.125 MiB elsewhere.
    """
    return 2 * (32 * MIB if capability in ((9, 0), (10, 0), (10, 3)) else 8 * MIB + 128 * 1024)


def _card(
    name: str, total_mib: int, multiprocessors: int, capability: tuple[int, int], tflops: float, gb_per_s: float
) -> Card:
    # Measured on an H100 with 132 multiprocessors: 618 MiB of bare context, 480 MiB kept by the driver of 81,559.
    context = round(618 * MIB * multiprocessors / 132) + KERNELS_BYTES
    driver = round(total_mib * MIB * 0.0195)
    return Card(name, total_mib * MIB, driver, context, capability, multiprocessors, tflops * 1e12, gb_per_s * 1e9)


H100 = Card("H100 80GB HBM3", 81559 * MIB, 480 * MIB, 751 * MIB, (9, 0), 132, 989e12, 3.35e12, is_measured=True)

CARDS = (
    _card("RTX 3060", 12288, 28, (8, 6), 51, 360),
    _card("RTX 3080", 10240, 68, (8, 6), 60, 760),
    _card("RTX 3090", 24576, 82, (8, 6), 71, 936),
    _card("RTX 3090 Ti", 24564, 84, (8, 6), 80, 1008),
    _card("RTX 4060 Ti 16GB", 16380, 34, (8, 9), 88, 288),
    _card("RTX 4070", 12282, 46, (8, 9), 58, 504),
    _card("RTX 4070 Ti SUPER", 16376, 66, (8, 9), 88, 672),
    _card("RTX 4080", 16376, 76, (8, 9), 97, 717),
    _card("RTX 4090", 24564, 128, (8, 9), 165, 1008),
    _card("RTX 5070 Ti", 16303, 70, (12, 0), 88, 896),
    _card("RTX 5080", 16303, 84, (12, 0), 113, 960),
    _card("RTX 5090", 32607, 170, (12, 0), 210, 1792),
    _card("RTX A5000", 24564, 64, (8, 6), 111, 768),
    _card("RTX A6000", 49140, 84, (8, 6), 155, 768),
    _card("RTX 6000 Ada", 49140, 142, (8, 9), 182, 960),
    _card("T4", 15360, 40, (7, 5), 65, 320),
    _card("L4", 23034, 58, (8, 9), 121, 300),
    _card("A10", 23028, 72, (8, 6), 125, 600),
    _card("L40S", 46068, 142, (8, 9), 362, 864),
    _card("A100 40GB", 40960, 108, (8, 0), 312, 1555),
    _card("A100 80GB", 81920, 108, (8, 0), 312, 2039),
    H100,
    _card("H200", 143771, 132, (9, 0), 989, 4800),
)

RTX_4090 = next(card for card in CARDS if card.name == "RTX 4090")


def find_card(name: str) -> Card:
    """Return the card of a name as people write it ("rtx 4090", "NVIDIA GeForce RTX 4090", "4090").

    Raises:
        ConfigError: There is none, or several could be meant.
    """
    known = {_plain(card.name): card for card in CARDS}
    asked = _plain(name)
    if asked in known:
        return known[asked]
    # "4070" is the RTX 4070 and not its larger sisters.
    exact = [card for plain, card in known.items() if asked and plain in (f"rtx {asked}", f"rtx a{asked}")]
    if len(exact) == 1:
        return exact[0]
    matches = [card for plain, card in known.items() if asked and set(asked.split()) <= set(plain.split())]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(card.name for card in matches or CARDS)
    close = get_close_matches(asked, known, n=1)
    suggestion = f" (did you mean {known[close[0]].name}?)" if close and not matches else ""
    problem = "can be several cards" if matches else f"is no card dsft knows{suggestion}"
    raise ConfigError(f"--gpu: {name!r} {problem}.", f"Take one of: {names}; or give its memory with --vram GIB.")


def recognize_card(device_name: str, total_bytes: int | None = None) -> Card | None:
    """Return the record of the card the driver names, or None where there is no such record.

    The driver's names have words for a card's form and may lack its memory: that has to agree within 6 % where it is
    given (a laptop's card of the same name has less).
    """
    words = set(_plain(device_name).split())
    sizes = {word for word in words if _is_size(word)}
    for card in sorted(CARDS, key=lambda card: -len(card.name)):
        own = set(_plain(card.name).split())
        own_sizes = {word for word in own if _is_size(word)}
        is_same_name = own - own_sizes <= words and words - own - sizes <= _FORM_WORDS
        is_same_size = total_bytes is None or abs(card.total_bytes / total_bytes - 1) < 0.06
        if is_same_name and is_same_size and (own_sizes == sizes or not (own_sizes and sizes)):
            return card
    return None


def card_of_device(device_name: str, total_bytes: int, capability: tuple[int, int], multiprocessors: int) -> Card:
    """Return the record of the card the driver names, or one made of what the driver says about it."""
    known = recognize_card(device_name, total_bytes)
    if known is not None:
        return known
    like = next((card for card in CARDS if card.capability == capability), RTX_4090)
    scale = multiprocessors / like.multiprocessors
    tflops, gb_per_s = like.matmul_flops / 1e12 * scale, like.bandwidth / 1e9 * scale
    return _card(device_name, total_bytes // MIB, multiprocessors, capability, tflops, gb_per_s)


def card_of_memory(vram_gib: float) -> Card:
    """Return a card of a nominal size that is otherwise an RTX 4090."""
    total = round(vram_gib * GIB)
    share = RTX_4090.driver_bytes / RTX_4090.total_bytes
    return Card(
        f"a card of {vram_gib:g} GiB",
        total,
        round(total * share),
        RTX_4090.context_bytes,
        RTX_4090.capability,
        RTX_4090.multiprocessors,
        RTX_4090.matmul_flops,
        RTX_4090.bandwidth,
    )


_FORM_WORDS = frozenset({"sxm2", "sxm4", "sxm5", "pcie", "generation", "hbm2", "hbm2e", "hbm3", "hbm3e", "nvl"})
"""Words in the driver's names that tell a card's form and not the card."""


def _is_size(word: str) -> bool:
    return word.removesuffix("gb").isdigit() and word.endswith("gb")


def _plain(name: str) -> str:
    words = name.lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in ("nvidia", "geforce", "graphics", "tesla", "quadro", "gpu"))
