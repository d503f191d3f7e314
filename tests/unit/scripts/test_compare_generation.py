"""The comparison with transformers' generate: it finds what differs and calls nothing a tie that is none."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.scripted_models import write_adapter, write_random_model

SCRIPTS = Path(__file__).parents[3] / "scripts"
PROMPT = [5, 17, 42, 99, 3]


@pytest.fixture(scope="module")
def script() -> Any:
    """Make the script importable for this file alone."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import compare_generation

        yield compare_generation
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_random_model(folder / "random")
    write_adapter(folder / "adapter", folder / "random")
    prompts = ("def add(a, b):\n", "def add(a, b):\ndef add(a, b):\n", "x", "for each of them:\n", "go")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    return folder


@pytest.fixture
def run(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*options: str) -> Any:
        fixed = ("--prompts", str(folder / "prompts.jsonl"), "--num", "5", "--new-tokens", "20", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["compare_generation.py", *fixed, *options])
        script.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_all_ways_agree_with_transformers_in_float32(run: Any, folder: Path) -> None:
    ways = ("--dtype", "float32", "--speculate", "--rows", "3")
    record = run("--model", str(folder / "random"), "--adapter", str(folder / "adapter"), *ways)
    assert {name: way["num_equal"] for name, way in record["ways"].items()} == {"one": 5, "lookup": 5, "rows": 5}
    assert record["decoder"] == "PlainDecoder"


def test_a_decoder_that_errs_is_found_out(run: Any, script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_right = script.Session.load

    def load(session: Any) -> Any:
        decoder = load_right(session)
        if not hasattr(decoder, "is_wrong"):
            decoder.is_wrong = True
            right = decoder.step
            decoder.step = lambda token_ids: -right(token_ids)  # takes the unlikeliest
        return decoder

    monkeypatch.setattr(script.Session, "load", load)
    record = run("--model", str(folder / "random"), "--dtype", "bfloat16", "--check-float32")
    way = record["ways"]["one"]
    assert (way["num_equal"], way["num_ties"], way["num_other"]) == (0, 0, 5)
    for index, difference in enumerate(way["differences"]):
        assert (difference["prompt"], difference["position"]) == (index, 1)
        assert difference["gap_in_spacings"] > 2 * difference["rounding_bound_in_spacings"]
        assert difference["float32_gap_in_spacings"] == pytest.approx(difference["gap_in_spacings"], rel=0.2)


@pytest.mark.parametrize(
    ("magnitude", "spacing"), [(1.0, 2**-7), (1.99, 2**-7), (2.0, 2**-6), (17.3, 2**-3), (0.3, 2**-9)]
)
def test_spacings_are_those_of_the_type(script: Any, magnitude: float, spacing: float) -> None:
    assert script.measure_spacing(magnitude, torch.bfloat16) == spacing
    number = torch.tensor(magnitude, dtype=torch.bfloat16)
    assert (torch.nextafter(number, torch.tensor(1e9, dtype=torch.bfloat16)) - number).item() == spacing


def test_the_bound_is_what_rounding_the_heads_input_can_do(script: Any, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "random", dtype=torch.bfloat16)
    bound = script.bound_hidden_rounding(model, PROMPT, 7, 11)
    hidden: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda *arguments: hidden.append(arguments[2]))
    script.read_logits(model, PROMPT)
    state = hidden[0][0, -1].double()
    row = model.lm_head.weight[7].double() - model.lm_head.weight[11].double()
    worst = state * (1 + torch.sign(state * row) * 2**-8)
    assert bound == pytest.approx(((worst - state) * row).sum().item(), rel=1e-6)
