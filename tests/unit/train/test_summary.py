"""The files of a finished run: strict JSON that reads back, a plot that shows the losses, a card that is true."""

import dataclasses
import io
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from dsft.core.errors import ModelError
from dsft.core.markdown import is_hub_id
from dsft.train.loss_plot import draw_losses, smooth
from dsft.train.model_card import render_model_card
from dsft.train.summary import CARD, PLOT, SUMMARY, read_summary, write_summary
from tests.train_results import make_cpu_result, make_result


def front_matter(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    fields: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return fields


def snippet(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found.group(1)


# training_summary.json


def test_a_summary_reads_back_as_it_was(tmp_path: Path) -> None:
    result = make_result(events=[{"event": "Validated", "step": 20, "loss": 0.7}])
    write_summary(result, tmp_path)
    assert read_summary(tmp_path) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([SUMMARY, PLOT, CARD])


def test_numbers_that_json_has_not_become_null_and_come_back_as_nan(tmp_path: Path) -> None:
    losses = [(1, 2.0), (2, math.inf), (3, math.nan)]
    write_summary(make_result(first_loss=math.nan, losses=losses), tmp_path)
    text = (tmp_path / SUMMARY).read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["first_loss"] is None
    assert content["losses"] == [[1, 2.0], [2, None], [3, None]]
    result = read_summary(tmp_path)
    assert math.isnan(result.first_loss)
    assert result.losses[0] == (1, 2.0)
    assert math.isnan(result.losses[1][1])


def test_keys_of_later_versions_are_passed_over_and_new_fields_may_lack(tmp_path: Path) -> None:
    result = make_result()
    content = json.loads(json.dumps(dataclasses.asdict(result))) | {"from_the_future": 1}
    del content["device"], content["events"]
    (tmp_path / SUMMARY).write_text(json.dumps(content), encoding="utf-8")
    assert read_summary(tmp_path) == dataclasses.replace(result, device="", events=[])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no finished run"),
        (b'{"run_name": ', "can't be read"),
        (b"\xff\xfe", "can't be read"),
        (b"[1]", "no JSON object"),
        (b'{"run_name": "a", "num_steps": "many"}', "num_steps"),
        (b'{"losses": 3}', "losses"),
        (b'{"losses": [[1, null], [2]]}', "losses"),
    ],
)
def test_what_is_no_summary_is_refused_with_its_path(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / SUMMARY).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_summary(tmp_path)
    assert words in caught.value.found
    assert str(tmp_path) in caught.value.found
    assert caught.value.fix


def test_a_failing_plot_leaves_the_older_summary_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(make_result(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(result: object) -> bytes:
        raise OSError("no space left on device")

    monkeypatch.setattr("dsft.train.summary.draw_losses", fail)
    with pytest.raises(OSError, match="no space"):
        write_summary(make_result(num_steps=99), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# loss.png


def read_png(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count_near(pixels: np.ndarray, color: str) -> int:
    wanted = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(axis=-1) < 24).sum())


def test_the_plot_shows_both_curves_and_only_those_there_are() -> None:
    both = read_png(draw_losses(make_result()))
    assert both.shape == (720, 1280, 3)
    assert count_near(both, "#2a6fbb") > 2000
    assert count_near(both, "#d1581b") > 1000
    training_alone = read_png(draw_losses(make_result(validation_losses=[], best_step=None, best_validation_loss=None)))
    assert count_near(training_alone, "#d1581b") == 0


def test_a_falling_loss_falls_in_the_plot() -> None:
    pixels = read_png(draw_losses(make_result(validation_losses=[], best_step=None, best_validation_loss=None)))
    is_curve = np.abs(pixels - [0x2A, 0x6F, 0xBB]).max(axis=-1) < 24
    rows, columns = np.nonzero(is_curve[:, 100:800])  # left of the legend
    early, late = rows[columns < 50].mean(), rows[columns > 600].mean()
    assert early + 100 < late


@pytest.mark.parametrize("num_steps", [0, 1, 2, 19, 20, 3000])
def test_a_run_of_any_length_is_drawn(num_steps: int) -> None:
    losses = [(step, 1.0 / step) for step in range(1, num_steps + 1)]
    assert draw_losses(make_result(losses=losses)).startswith(b"\x89PNG")


def test_names_that_look_like_formulas_and_losses_that_are_no_numbers_are_drawn() -> None:
    result = make_result({"dataset": "/data/" + "long/" * 80}, run_name="模型 $x_{$", losses=[(1, math.nan), (2, 1.0)])
    assert draw_losses(result).startswith(b"\x89PNG")


def test_drawing_leaves_pyplot_alone() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import dsft.train.summary; assert 'matplotlib' not in sys.modules; "
        "from dsft.train.loss_plot import draw_losses; from tests.train_results import make_result; "
        "draw_losses(make_result()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_smoothing_keeps_a_constant_and_leaves_nan_out() -> None:
    assert smooth([2.0] * 9, 5) == [2.0] * 9
    assert smooth([1.0, 3.0, 5.0], 3) == [1.0, 3.0, 4.0]
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([math.nan], 3)[0])


# README.md


def test_the_card_tells_the_hub_what_it_knows_and_no_licence() -> None:
    fields = front_matter(render_model_card(make_result()))
    assert fields["base_model"] == "deepseek-ai/deepseek-coder-6.7b-base"
    assert fields["library_name"] == "peft"
    assert fields["datasets"] == ["sahil2801/CodeAlpaca-20k"]
    assert "base_model:adapter:deepseek-ai/deepseek-coder-6.7b-base" in fields["tags"]  # type: ignore[operator]
    assert "license" not in fields


def test_local_models_and_files_are_no_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert [is_hub_id(name) for name in ("a/b", "data/train", "./a/b", "a/b/c", "builtin:tiny/model", "~/b", "b")] == [
        True, False, False, False, False, False, False,
    ]  # fmt: skip
    model = make_result().model | {"name": "builtin:tiny/model", "revision": None}
    fields = front_matter(render_model_card(make_result({"dataset": "data/train"}, model=model)))
    assert "base_model" not in fields
    assert "datasets" not in fields


def test_the_card_names_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    model = make_result().model | {"name": "/home/ada/models/smol", "revision": None}
    result = make_result(
        {"dataset": "/home/ada/data.jsonl", "model_name": "/home/ada/models/smol"},
        model=model,
        save_dir="/home/ada/runs/first",
        output_dir="/home/ada/runs/out",
    )
    card = render_model_card(result)
    assert "/home" not in card
    assert "`~/data.jsonl`" in card
    assert "--model ./first" in card
    assert 'os.path.expanduser("~/models/smol")' in snippet(card)


@pytest.mark.parametrize("name", ["deepseek-ai/deepseek-coder-6.7b-base", "builtin:tiny/model", "./models/a"])
def test_the_python_of_the_card_compiles_and_uses_the_trained_prompt(name: str) -> None:
    prompt = '<s>### Instruction:\nSay "hi" \\ bye.\n\n### Response:\n'
    result = make_result({"model_name": name}, model=make_result().model | {"name": name}, example_prompt=prompt)
    code = snippet(render_model_card(result))
    compile(code, "card", "exec")
    assignment = next(line for line in code.splitlines() if line.startswith("prompt = "))
    namespace: dict[str, str] = {}
    exec(assignment, namespace)
    assert namespace["prompt"] == prompt


@pytest.mark.parametrize("template", ["instruction", "deepseek", "chat", "fim", "text"])
def test_the_command_of_the_card_is_one_of_dsft(template: str) -> None:
    card = render_model_card(make_result(template=template, save_dir="my runs/first"))
    found = re.search(r"```sh\n(.*?)\n```", card, re.DOTALL)
    assert found is not None
    words = shlex.split(found.group(1))
    assert words[:2] == ["dsft", "infer"]
    assert words[3:] == ["--model", "my runs/first"]


def test_the_card_holds_the_results_and_tables_that_no_value_breaks() -> None:
    result = make_result(techniques={"QLoRA": "NF4 | double\nquantization"})
    card = render_model_card(result)
    assert "| QLoRA | NF4 \\| double quantization |" in card
    assert "1,176 samples to train on and 24 held out" in card
    assert "0.7000 at step 20" in card
    assert "16,384 tokens/s" in card
    assert "18.0 GiB" in card
    assert f"![Training and validation loss]({PLOT})" in card


def test_a_cpu_run_claims_no_gpu_memory_and_no_speed_it_has_not_measured() -> None:
    card = render_model_card(make_cpu_result(train_tok_per_s=0.0))
    assert "GPU memory" not in card
    assert "tokens/s" not in card
