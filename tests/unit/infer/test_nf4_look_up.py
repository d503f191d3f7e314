"""The PTX that unpacks NF4 weights, run by an interpreter of its few instructions."""

import re

import numpy as np
import numpy.typing as npt
import pytest
from bitsandbytes.functional import get_4bit_type

from dsft.infer.decoding.cuda.nf4_look_up import NF4_CODE, TABLES, write_inner_product, write_unpacking

CODE = np.array(NF4_CODE, dtype=np.float16)


def permute(low: int, high: int, selector: int) -> int:
    """Return what `prmt.b32` gives: bytes of two words by number, or the sign of one spread over a byte."""
    data = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    chosen = []
    for place in range(4):
        number = selector >> 4 * place & 15
        byte = data[number & 7]
        chosen.append((255 if byte & 128 else 0) if number & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def choose(mask: int, true: int, false: int) -> int:
    return mask & true | ~mask & false & 0xFFFFFFFF


def halves(word: int) -> npt.NDArray[np.float16]:
    return np.array([word], dtype=np.uint32).view(np.float16)


def multiply(first: int, second: int, third: int | None = None) -> int:
    result = halves(first) * halves(second)
    if third is not None:  # fused: rounded once
        exact = halves(first).astype(np.float64) * halves(second) + halves(third)
        result = exact.astype(np.float16)
    return int(result.view(np.uint32)[0])


def run(program: str, operands: dict[str, int]) -> dict[str, float]:
    values: dict[str, float] = dict(operands)

    def read(name: str) -> int:
        return int(values[name]) if name in values else int(name, 0)

    for line in program.splitlines():
        found = re.fullmatch(r"(\w+)\.([\w.]+) (.*);", line)
        if found is None or line.startswith("."):
            continue
        name, kind, arguments = found[1], found[2], [each.strip(" {}") for each in found[3].split(",")]
        target, *sources = arguments
        if name == "mov":
            values["low"], values["high"] = read(sources[-1]) & 0xFFFF, read(sources[-1]) >> 16
        elif name == "cvt":
            values[target] = float(np.array([read(sources[0])], dtype=np.uint16).view(np.float16)[0])
        elif name == "add":
            values[target] = values[sources[0]] + values[sources[1]]
        elif name in {"mul", "fma"}:
            assert kind == "rn.f16x2"
            values[target] = multiply(*map(read, sources))
        else:
            first, second, *rest = map(read, sources)
            values[target] = {
                "and": lambda a, b: a & b,
                "shl": lambda a, b: a << b & 0xFFFFFFFF,
                "shr": lambda a, b: a >> b,
                "prmt": permute,
                "lop3": lambda a, b, c, table: choose(a, b, c) if table == 0xCA else pytest.fail("another function"),
            }[name](first, second, *rest)
    return values


def test_the_code_is_that_of_bitsandbytes() -> None:
    assert get_4bit_type("nf4", device="cpu").tolist() == list(NF4_CODE)


def test_every_byte_becomes_its_two_values() -> None:
    program = write_unpacking()
    for byte in range(256):
        data = np.array([byte, 255 - byte, byte ^ 0x5A, byte * 7 % 256], dtype=np.uint8)
        values = run(program, {"$4": int(data.view(np.uint32)[0])})
        upper, lower = (
            np.concatenate([halves(int(values[name])) for name in pair]) for pair in (("$0", "$1"), ("$2", "$3"))
        )
        assert (upper == CODE[data >> 4]).all()
        assert (lower == CODE[data & 15]).all()


def test_eight_weights_are_multiplied_with_their_own_numbers() -> None:
    program = write_inner_product()
    generator = np.random.default_rng(0)
    tables = {f"${6 + index}": word & 0xFFFFFFFF for index, word in enumerate(TABLES)}
    for _ in range(200):
        data = generator.integers(0, 256, 4).astype(np.uint8)
        numbers = (generator.standard_normal(8) * 100).astype(np.float16)
        words = {f"${2 + index}": int(word) for index, word in enumerate(numbers.view(np.uint32))}
        values = run(program, {"$1": int(data.view(np.uint32)[0]), **words, **tables})
        weights = np.stack([CODE[data >> 4], CODE[data & 15]], axis=1).reshape(-1).astype(np.float64)
        products = weights * numbers
        assert abs(values["$0"] - products.sum()) <= 2**-10 * np.abs(products).sum()
