"""What `dsft train` writes where: for people, as JSON lines, quietly."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsft.cli.app import main
from dsft.train.events import EventSink, Notice, Phase, StepDone


@dataclass(frozen=True)
class Result:
    """Stands for the run's result."""

    save_dir: Path
    final_loss: float


def tell_a_run(sink: EventSink) -> Result:
    sink(Phase("load model"))
    sink(Notice("a choice was made"))
    sink(Notice("pages can't be used", "warning"))
    sink(StepDone(1, 2, 0.5, 1.25, math.nan, 2e-4, 100, 40, 0.5, 200.0, 0.5))
    return Result(Path("trained"), math.inf)


def test_json_is_one_object_a_line_and_the_result_comes_last(fake_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run.behave = tell_a_run
    assert main(["train", "--json"]) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["event"] for record in records] == ["Phase", "Notice", "Notice", "StepDone", "Result"]
    assert (records[3]["loss"], records[3]["grad_norm"]) == (1.25, None)
    assert records[4] == {"event": "Result", "save_dir": "trained", "final_loss": None}
    assert captured.err == ""


def test_quiet_tells_warnings_alone(fake_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run.behave = tell_a_run
    assert main(["train", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: pages can't be used\n"


def test_the_summary_is_data_and_the_progress_is_not(fake_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run.behave = tell_a_run
    assert main(["train"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "SUMMARY\n"
    assert "pages can't be used" in captured.err


def test_resume_and_overwrite_reach_the_run(fake_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run.behave = tell_a_run
    main(["train", "--quiet", "--resume"])
    assert (fake_run.is_resumed, fake_run.is_overwriting) == (True, False)
    main(["train", "--quiet", "--overwrite"])
    assert (fake_run.is_resumed, fake_run.is_overwriting) == (False, True)


def test_the_configuration_table_names_every_value_and_its_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsft.cli.output import Output
    from dsft.cli.views.config import render_config
    from dsft.core.config.load import load_train_config

    resolved = load_train_config("conservative", flags={"learning_rate": "1e-3", "model_revision": "a" * 70})
    Output().show(render_config(resolved))
    rows = {words[0]: words[1:] for words in (line.split() for line in capsys.readouterr().out.splitlines()) if words}
    assert rows["max_length"] == ["512", "preset", "conservative"]
    assert rows["learning_rate"] == ["0.001", "--learning-rate"]
    assert rows["max_samples"] == ["none", "default"]
    assert rows["packing"] == ["false", "default"]
    assert set(type(resolved.config).model_fields) <= set(rows)


def test_a_dry_run_tells_steps_samples_and_techniques(capsys: pytest.CaptureFixture[str]) -> None:
    from dsft.cli.output import Output
    from dsft.cli.views.config import render_plan

    counts = SimpleNamespace(num_steps=1234, num_train_samples=19622, num_validation_samples=400)
    Output().show(render_plan(SimpleNamespace(**vars(counts), techniques={"QLoRA": "NF4"})))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        "optimizer steps 1,234", "samples to train on 19,622", "samples held out 400", "QLoRA NF4",
    ]  # fmt: skip
