"""Train, merge, infer and train again as a user does, each in a process of its own, on the embedded model."""

import json
from pathlib import Path

import pytest

from tests.conftest import RunDsft

SHORT = ("train", "--preset", "tiny", "--max-samples", "24", "--epochs", "1", "--max-steps", "3")


@pytest.mark.long
def test_a_run_is_merged_answers_and_is_trained_again(tmp_path: Path, run_dsft: RunDsft) -> None:
    assert run_dsft(*SHORT).returncode == 0
    before = {path.name for path in (tmp_path / "trained_tiny").iterdir()}
    done = run_dsft("merge", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "Adapter: ./trained_tiny, the newest finished run." in done.stderr
    merged = tmp_path / "trained_tiny" / "merged_model"
    assert {path.name for path in (tmp_path / "trained_tiny").iterdir()} == before | {"merged_model"}
    told = json.loads((merged / "merge_summary.json").read_text(encoding="utf-8"))
    assert (told["base"], told["template"]) == ("builtin:tiny/model", "instruction")
    assert str(tmp_path) not in (merged / "README.md").read_text() + json.dumps(told)

    question = ("infer", "Write a Python function add(a, b).", "--json", "--model")
    answers = [json.loads(run_dsft(*question, str(folder)).stdout) for folder in (merged.parent, merged)]
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["num_prompt_tokens"] == answers[1]["num_prompt_tokens"]

    assert run_dsft(*SHORT, "--overwrite").returncode == 0
    assert {path.name for path in (tmp_path / "trained_tiny").iterdir()} == before
