"""Keys from what terminals send, however it is cut into pieces."""

import pytest

from dsft.cli.terminal_keys import KeyParser

SENT = [
    (b"q", ["q"]),
    (b"\x1b[A\x1b[B", ["up", "down"]),
    (b"\x1bOA\x1bOB\x1bOH\x1bOF", ["up", "down", "home", "end"]),
    (b"\x1b[H\x1b[F\x1b[1~\x1b[4~\x1b[7~\x1b[8~", ["home", "end", "home", "end", "home", "end"]),
    (b"\x1b[5~\x1b[6~", ["page_up", "page_down"]),
    (b"\x1b[1;5A\x1b[5;2~", ["up", "page_up"]),  # with Ctrl, with Shift
    (b"\x1b\x1b[A", ["up"]),  # with Alt, as some send it
    (b"\x1bq", []),  # Alt-q
    (b"\x1b[15~\x1b[?1;2c\x1bOPs", ["s"]),  # F5, an answer nobody asked for, F1
    ("é日".encode() + b"s", [*"é日".encode().decode("latin-1"), "s"]),
    (b"\x1b[" + b"1;" * 40 + b"q", None),  # noise
]


@pytest.mark.parametrize(("data", "keys"), SENT)
def test_keys_are_the_same_however_they_are_cut(data: bytes, keys: list[str] | None) -> None:
    if keys is not None:
        assert KeyParser().feed(data) == keys
        for cut in range(len(data)):
            parser = KeyParser()
            assert parser.feed(data[:cut]) + parser.feed(data[cut:]) == keys
            assert not parser.is_waiting
    parser = KeyParser()
    one_by_one = [key for position in range(len(data)) for key in parser.feed(data[position : position + 1])]
    assert keys is None or one_by_one == keys
    assert not parser.is_waiting


def test_escape_alone_is_known_when_nothing_follows() -> None:
    parser = KeyParser()
    assert parser.feed(b"s\x1b") == ["s"] and parser.is_waiting
    assert parser.give_up() == ["escape"] and not parser.is_waiting


@pytest.mark.parametrize("begun", [b"\x1b[", b"\x1bO", b"\x1b[1;"])
def test_a_sequence_that_never_ends_is_no_key(begun: bytes) -> None:
    parser = KeyParser()
    assert parser.feed(begun) == [] and parser.is_waiting
    assert parser.give_up() == [] and not parser.is_waiting
    assert parser.feed(b"q") == ["q"]
