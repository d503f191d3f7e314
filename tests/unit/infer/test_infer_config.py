"""Settings of `dsft infer`: what is refused, and when tokens are drawn at random."""

from typing import Any

import pytest

from dsft.core.errors import ConfigError, InputError
from dsft.core.models.device import Device
from dsft.infer.config import InferConfig
from dsft.infer.dtype import resolve_dtype
from dsft.infer.sampling import choose_sampling


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"temperature": 1e-40}, r"--temperature is 1e-40, but must be 0 or from 0\.001 to 100"),
        ({"temperature": 0.0009}, "--temperature"),
        ({"temperature": 100.1}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"top_p": float("nan")}, "--top-p"),
        ({"top_k": 0}, "--top-k"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"repetition_penalty": 1e-300}, r"--repetition-penalty is 1e-300, but must be from 0\.01 to 100"),
        ({"repetition_penalty": 100.1}, "--repetition-penalty"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty"),
        ({"seed": -1}, "--seed"),
        ({"stop": ("ok", "")}, "--stop"),
        ({"temperature": 0.0, "top_p": 0.9}, "--temperature 0"),
        ({"is_raw": True, "template": "chat"}, "--template chat"),
        ({"is_raw": True, "system": "Be brief."}, "--system"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        InferConfig(**settings)


@pytest.mark.parametrize("settings", [{"temperature": 0.001, "repetition_penalty": 0.01}, {"temperature": 100}])
def test_takes_settings_at_their_limits(settings: dict[str, Any]) -> None:
    assert InferConfig(**settings).is_sampling
    assert InferConfig(repetition_penalty=100).repetition_penalty == 100


def test_names_all_that_is_wrong_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--max-new-tokens is 0.*--top-k is 0") as caught:
        InferConfig(max_new_tokens=0, top_k=0)
    assert caught.value.exit_code == 2


HELP = "`dsft infer --help` lists what each option takes."


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"is_raw": True, "system": "Be brief."}, "Leave one of them out."),
        ({"is_raw": True, "template": "chat"}, "Leave one of them out."),
        ({"temperature": 0.0, "top_k": 5}, "Leave one of them out."),
        ({"top_k": 0}, HELP),
        ({"top_k": 0, "is_raw": True, "template": "chat"}, f"{HELP} Leave out one of two that contradict."),
    ],
)
def test_the_hint_fits_what_is_wrong(settings: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InferConfig(**settings)
    assert caught.value.fix == fix


def test_refuses_bytes_that_are_no_text() -> None:
    with pytest.raises(InputError, match="system text is not valid UTF-8 at character 3"):
        InferConfig(system="ab\udcff")


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 5}, 1.0),
    ],
)
def test_sampling_is_what_the_options_ask_for(settings: dict[str, Any], temperature: float) -> None:
    sampling = choose_sampling(InferConfig(**settings))
    assert sampling.temperature == temperature
    assert (sampling.seed is None) == (temperature == 0)
    assert (sampling.top_p, sampling.top_k) == (settings.get("top_p", 1.0), settings.get("top_k", 0))


def test_a_given_seed_counts_and_a_drawn_one_varies() -> None:
    assert choose_sampling(InferConfig(temperature=1.0, seed=0)).seed == 0
    drawn = {choose_sampling(InferConfig(temperature=1.0)).seed for _ in range(4)}
    assert len(drawn) > 1


def test_the_number_type_follows_the_hardware() -> None:
    old, new, cpu = Device("cuda", "old", (7, 5)), Device("cuda", "new", (8, 9)), Device("cpu", "CPU")
    assert [resolve_dtype("auto", device) for device in (old, new, cpu)] == ["float16", "bfloat16", "float32"]
    assert resolve_dtype("float16", cpu) == "float16"
    with pytest.raises(ConfigError, match="old has no bfloat16"):
        resolve_dtype("bfloat16", old)
