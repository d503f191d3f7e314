"""How sixteen values of four bits each become numbers: PTX that Triton's kernels are given as text."""

import numpy as np

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of NF4 (QLoRA, appendix E)."""


def _pack_tables() -> list[list[int]]:
    """Return the upper and the lower bytes of the values in float16, four in a word."""
    halves = np.array(NF4_CODE, dtype=np.float16).view(np.uint16)
    return [part.astype(np.uint8).view(np.int32).tolist() for part in (halves >> 8, halves & 255)]


TABLES = tuple(word for table in _pack_tables() for word in table)
"""The tables' words, which a kernel takes as arguments: constants would be loaded again for each use."""


def _write_look_up(
    source: str, spread: str, results: tuple[str, str], orders: tuple[str, str], tables: tuple[str, ...]
) -> list[str]:
    """Return PTX that looks the four values of 16 bits up, and joins their bytes to two pairs of float16.

    A byte permutation looks up four values at once among eight, so each half of the table has one register of upper and
    one of lower bytes for each four entries; the top bit of a half byte, spread over a byte by the same instruction,
    chooses between the two halves. float16 keeps the values within 2^-12, an eighth of what bfloat16 rounds weights by.
    """
    lines = [f"and.b32 chosen, {source}, 0x7777;", f"prmt.b32 mask, shifted, $packed, {spread};"]
    for name, table in (("upper", tables[:4]), ("lower", tables[4:])):
        lines += [
            f"prmt.b32 a, {table[0]}, {table[1]}, chosen;",
            f"prmt.b32 b, {table[2]}, {table[3]}, chosen;",
            f"lop3.b32 {name}, mask, b, a, 0xCA;",
        ]
    return [
        *lines,
        *(f"prmt.b32 {result}, lower, upper, {order};" for result, order in zip(results, orders, strict=True)),
    ]


_REGISTERS = ".reg .b32 half, shifted, chosen, mask, a, b, upper, lower;"
_LOWER_BYTES, _UPPER_BYTES = "0xD9C8", "0xFBEA"


def write_unpacking() -> str:
    """Return PTX that turns four bytes ($4) into the values of their upper ($0, $1) and lower halves ($2, $3)."""
    orders = ("0x7351", "0x6240")
    tables = tuple(f"{word & 0xFFFFFFFF:#010x}" for word in TABLES)
    lines = [
        "{", _REGISTERS, "shl.b32 shifted, $4, 4;",
        *_write_look_up("$4", _LOWER_BYTES, ("$0", "$2"), orders, tables),
        "shr.u32 half, $4, 16;", *_write_look_up("half", _UPPER_BYTES, ("$1", "$3"), orders, tables), "}",
    ]  # fmt: skip
    return "\n".join(lines).replace("$packed", "$4")


def write_inner_product() -> str:
    """Return PTX for the sum ($0, float32) of eight weights ($1) times eight float16 numbers ($2 to $5, in pairs)."""
    orders, tables = ("0x4051", "0x6273"), tuple(f"${operand}" for operand in range(6, 14))
    lines = [
        "{", _REGISTERS, ".reg .b32 w0, w1, w2, w3, t;", ".reg .b16 low, high;", ".reg .f32 x, y;",
        "shl.b32 shifted, $1, 4;", *_write_look_up("$1", _LOWER_BYTES, ("w0", "w1"), orders, tables),
        "shr.u32 half, $1, 16;", *_write_look_up("half", _UPPER_BYTES, ("w2", "w3"), orders, tables),
        "mul.rn.f16x2 t, w0, $2;", "fma.rn.f16x2 t, w1, $3, t;", "fma.rn.f16x2 t, w2, $4, t;",
        "fma.rn.f16x2 t, w3, $5, t;", "mov.b32 {low, high}, t;", "cvt.f32.f16 x, low;", "cvt.f32.f16 y, high;",
        "add.f32 $0, x, y;", "}",
    ]  # fmt: skip
    return "\n".join(lines).replace("$packed", "$1")
