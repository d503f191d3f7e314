"""The end of a run: every figure that was measured, nothing that was not, and a command that can be copied."""

import io
import subprocess

import pytest
from rich.console import Console

from dsft.cli.output import Output
from dsft.cli.views.summary import render_summary
from dsft.core.data.example_question import example_question
from dsft.core.units import GIB
from dsft.train.events import TrainResult
from tests.train_results import make_cpu_result, make_result


def draw(result: TrainResult, width: int = 100, encoding: str = "utf-8") -> str:
    """Return what `dsft train` shows, all of it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    output = Output()
    output.stdout = Console(file=file, width=width)
    output.show(render_summary(result))
    file.seek(0)
    return file.read()


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_shows_every_technique_and_how_it_was_used() -> None:
    techniques = {"QLoRA": "NF4 4-bit weights, bf16 compute", "LoRA": "rank 64", "packing": "off"}
    drawn = squeezed(draw(make_result(techniques=techniques)))
    assert "QLoRA NF4 4-bit weights, bf16 compute LoRA rank 64 packing off" in drawn


def test_shows_what_was_measured() -> None:
    drawn = squeezed(draw(make_result()))
    for words in (
        "40, 3 epochs",
        "12 min 34 s on NVIDIA GeForce RTX 4090",
        "1.4048 → 0.5183 (-63 %)",
        "1.6000 → 0.7000 (-56 %) best, step 20; 0.8000 at step 40",
        "16,384 tok/s, 8,000 of them targets; 1.00 s a step",
        "17.0 GiB allocated · 18.0 GiB reserved · 23.0 GiB of 24.0 GiB on the device",
    ):
        assert words in drawn, words


def test_shows_what_was_predicted_beside_it() -> None:
    predicted = {
        "predicted_memory_allocated_bytes": 17 * GIB,
        "predicted_memory_reserved_bytes": round(18.18 * GIB),
        "predicted_memory_device_bytes": round(22.77 * GIB),
    }
    drawn = squeezed(draw(make_result(**predicted)))
    words = "17.0 GiB allocated (+0.0 %) · 18.2 GiB reserved (+1.0 %) · 22.8 GiB on the device (-1.0 %)"
    assert f"predicted {words}" in drawn
    assert "predicted" not in draw(make_result())


def test_one_epoch_is_no_plural() -> None:
    assert "40, 1 epoch\n" in "\n".join(line.rstrip() for line in draw(make_result(num_epochs=1.0)).splitlines())


def test_a_cpu_run_shows_the_memory_of_the_host_alone() -> None:
    drawn = squeezed(draw(make_cpu_result()))
    assert "3.0 GiB of host memory" in drawn
    assert "reserved" not in drawn


def test_a_run_without_validation_shows_none() -> None:
    drawn = draw(make_result(validation_losses=[], best_step=None, best_validation_loss=None))
    assert "validation" not in drawn


def test_a_rising_loss_is_not_sold_as_a_fall() -> None:
    assert "(+50 %)" in draw(make_result(first_loss=1.0, final_loss=1.5))


def test_a_resumed_run_says_where_it_went_on() -> None:
    assert "for the steps after 30" in draw(make_result(first_step=30))


def test_names_the_adapter_that_was_kept() -> None:
    assert "of the best step, 20" in draw(make_result(kept="best"))
    assert "of the last step" in draw(make_result())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_next_command_can_be_pasted_into_a_shell(width: int) -> None:
    result = make_result(save_dir="my runs/first")
    drawn = draw(result, width)
    command = drawn[drawn.index("dsft infer") : drawn.index("my runs/first'") + len("my runs/first'")]
    assert ("\\" in command) == (width < 200)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    asked = example_question(result.template)
    assert words.stdout.split("\0") == ["dsft", "infer", asked, "--model", "my runs/first", ""]


def test_gives_advice_where_there_is_some_and_else_nothing() -> None:
    short = make_result(train_tok_per_s=2400.0, peak_memory_device_bytes=8 * GIB)
    assert "--plan auto" in draw(short)
    assert "Faster" in draw(short)
    assert "Faster" not in draw(make_result())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_an_ascii_console_and_a_narrow_one_get_all_of_it(width: int) -> None:
    drawn = draw(make_result(), width, encoding="ascii")
    assert drawn.isascii()
    assert "?" not in drawn
    assert "(-56 %)" in squeezed(drawn)
    too_long = [line for line in drawn.splitlines() if len(line) > width and not line.startswith("  dsft infer")]
    assert too_long == []
