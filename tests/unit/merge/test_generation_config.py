"""The merged model's generation config: what it keeps, that transformers takes it, and that answers end by it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dsft.merge.generation_config import make_generation_config
from tests.scripted_models import EOS, TURN_END, write_scripted_model

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What transformers logs, which it otherwise keeps from other loggers."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def test_the_base_s_settings_are_kept() -> None:
    base = SAMPLING | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "repetition_penalty": 1.1}
    made = make_generation_config(base, {"eos_token_id": 9, "bos_token_id": 9}, [3], 2)
    assert made == base | {"eos_token_id": [2, 3]}
    assert base["eos_token_id"] == 2, "what was given stays as it was"


@pytest.mark.parametrize(
    ("base_eos", "model_eos", "stop_token_ids", "expected"),
    [
        (2, None, [2], 2),
        (2, None, [3], [2, 3]),
        ([2, 5], 7, [5, 3, 3], [2, 5, 3]),
        (None, 7, [3], [7, 3]),
        (None, [7, 3], [3], [7, 3]),
        (None, None, [3], 3),
        (None, -1, [3], 3),
        ([], None, [0], 0),
    ],
)
def test_every_end_token_ends(
    base_eos: int | list[int] | None,
    model_eos: int | list[int] | None,
    stop_token_ids: list[int],
    expected: int | list[int],
) -> None:
    made = make_generation_config({"eos_token_id": base_eos}, {"eos_token_id": model_eos}, stop_token_ids, None)
    assert made == {"eos_token_id": expected}


def test_without_a_file_of_the_base_the_model_names_its_tokens() -> None:
    made = make_generation_config(None, {"bos_token_id": 32013, "eos_token_id": 32014}, [32021], 32014)
    assert made == {"bos_token_id": 32013, "eos_token_id": [32014, 32021], "pad_token_id": 32014}


@pytest.mark.parametrize(
    ("base_pad", "model_pad", "expected"), [(4, 5, 4), (None, 5, 5), (None, -1, 6), (None, None, 6)]
)
def test_padding_is_the_tokenizers_where_the_base_names_none(
    base_pad: int | None, model_pad: int | None, expected: int
) -> None:
    made = make_generation_config({"pad_token_id": base_pad}, {"pad_token_id": model_pad}, [3], 6)
    assert made["pad_token_id"] == expected


def test_marks_of_a_file_made_from_the_models_config_go() -> None:
    base = {"_from_model_config": True, "transformers_version": "4.33.1", "eos_token_id": 2}
    assert make_generation_config(base, {}, [3], None) == {"eos_token_id": [2, 3]}


@pytest.mark.parametrize("base", [None, SAMPLING, {"_from_model_config": True, "eos_token_id": 2}])
def test_transformers_takes_it(tmp_path: Path, warned: pytest.LogCaptureFixture, base: dict[str, Any] | None) -> None:
    made = make_generation_config(base, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}, [3], 2)
    (tmp_path / "generation_config.json").write_text(json.dumps(made))
    loaded = GenerationConfig.from_pretrained(tmp_path)
    loaded.validate(strict=True)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {key: value for key, value in again.items() if key in made} == made
    assert not warned.records, warned.text


@pytest.mark.parametrize(("stop_token", "answer"), [(TURN_END, ["a", "b", EOS]), ("b", ["a", "b"])])
def test_an_answer_ends_at_the_base_s_end_token_and_at_the_one_that_the_run_taught(
    tmp_path: Path, warned: pytest.LogCaptureFixture, stop_token: str, answer: list[str]
) -> None:
    folder = write_scripted_model(tmp_path / "model", "ab")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model_config = json.loads((folder / "config.json").read_text())
    stop = tokenizer.convert_tokens_to_ids(stop_token)
    made = make_generation_config(None, model_config, [stop], tokenizer.eos_token_id)
    (folder / "generation_config.json").write_text(json.dumps(made))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("x\n", return_tensors="pt")
    token_ids = model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.convert_ids_to_tokens(token_ids) == answer
    assert not warned.records, warned.text
