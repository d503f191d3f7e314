"""The tape of allocations."""

import pytest

from dsft.core.memory.tape import Tape


def test_the_peak_is_the_most_that_was_alive_at_once() -> None:
    tape = Tape()
    tape.make("a", 1000)  # takes 1024
    tape.make("b", 512)
    tape.drop("a")
    tape.make("c", 1)  # takes 512
    assert (tape.live_bytes, tape.peak_bytes) == (1024, 1536)
    assert tape.alive() == {"b": 512, "c": 512}
    tape.drop("b", "c")
    assert (tape.live_bytes, tape.peak_bytes, tape.alive()) == (0, 1536, {})


def test_a_tensor_of_another_name_keeps_its_bytes() -> None:
    tape = Tape()
    tape.make("a", 1024)
    tape.rename("a", "b")
    assert tape.alive() == {"b": 1024} and tape.peak_bytes == 1024
    tape.make("a", 512)
    with pytest.raises(ValueError, match="b is alive already"):
        tape.rename("a", "b")
    with pytest.raises(KeyError):
        tape.rename("c", "d")


def test_a_computation_that_is_written_down_wrongly_is_an_error() -> None:
    tape = Tape()
    tape.make("a", 1)
    with pytest.raises(ValueError, match="a is alive already"):
        tape.make("a", 1)
    with pytest.raises(KeyError):
        tape.drop("b")
    tape.drop_if_there("a", "b")
    assert tape.live_bytes == 0
    with pytest.raises(KeyError):
        tape.drop("a")


def test_what_is_alive_is_a_copy() -> None:
    tape = Tape()
    tape.make("a", 1)
    tape.alive().clear()
    assert tape.alive() == {"a": 512}
