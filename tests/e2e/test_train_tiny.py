"""`dsft train` and `dsft infer` as a user runs them, on the embedded model: what trains in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.cli.app import main
from dsft.core.paths import live_runs_dir
from dsft.train.checkpoint import replace_folder
from tests.conftest import RunDsft

TINY = ("train", "--preset", "tiny")
SHORT = (*TINY, "--max-samples", "24", "--epochs", "1", "--max-steps", "3", "--save-steps", "2")
LONGER = (*TINY, "--max-samples", "48", "--epochs", "2", "--max-steps", "8", "--save-steps", "100")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def summary(folder: Path) -> dict:
    return json.loads((folder / "trained_tiny" / "training_summary.json").read_text(encoding="utf-8"))


def train_in(folder: Path, *args: str) -> Path:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "dsft", *args], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("run"), *SHORT)


@pytest.fixture(scope="module")
def longer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("run"), *LONGER)


def test_a_run_leaves_what_the_readme_says(short_run: Path):
    saved = {path.name for path in (short_run / "trained_tiny").iterdir()}
    expected = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "training_summary.json",
        "loss.png",
    }
    assert expected <= saved
    assert not [name for name in saved if name.startswith(".")]
    assert not list(short_run.rglob("training_args.bin"))
    results = {path.name for path in (short_run / "results_tiny").iterdir()}
    assert {"checkpoint-2", "checkpoint-3", "events.jsonl", "run.json"} <= results


def test_the_summary_tells_the_run(short_run: Path):
    told = summary(short_run)
    assert told["num_steps"] == 3
    assert [step for step, _ in told["losses"]] == [1, 2, 3]
    assert [step for step, _ in told["validation_losses"]] == [0, 2, 3]
    assert told["template"] == "instruction"
    assert told["config"]["max_samples"] == 24
    assert told["origins"]["max_samples"] == "--max-samples"
    assert told["origins"]["learning_rate"] == "preset tiny"
    assert told["train_tok_per_s"] > 0
    assert "NF4" in told["techniques"]["QLoRA"]


def test_infer_answers_from_the_run(short_run: Path, run_dsft: RunDsft):
    done = run_dsft("infer", "Write a Python function add(a, b).", "--max-new-tokens", "5", cwd=short_run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "trained_tiny" in done.stderr


def test_a_second_run_into_the_same_folders_is_refused(short_run: Path, run_dsft: RunDsft):
    before = summary(short_run)
    done = run_dsft(*SHORT, cwd=short_run)
    assert done.returncode == 2
    assert "--resume" in done.stderr and "--overwrite" in done.stderr
    assert summary(short_run) == before


def test_resuming_a_finished_run_changes_nothing(short_run: Path, run_dsft: RunDsft):
    before = {path: path.read_bytes() for path in (short_run / "trained_tiny").iterdir()}
    done = run_dsft(*SHORT, "--resume", cwd=short_run)
    assert done.returncode == 0, done.stderr
    assert "had finished" in done.stderr
    assert {path: path.read_bytes() for path in (short_run / "trained_tiny").iterdir()} == before


def test_a_final_folder_that_is_missing_is_written_from_the_last_checkpoint(
    short_run: Path, tmp_path: Path, run_dsft: RunDsft
):
    shutil.copytree(short_run / "results_tiny", tmp_path / "results_tiny")
    done = run_dsft(*SHORT, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    adapter = "trained_tiny/adapter_model.safetensors"
    assert (tmp_path / adapter).read_bytes() == (short_run / adapter).read_bytes()
    assert summary(tmp_path)["losses"] == summary(short_run)["losses"]
    assert summary(tmp_path)["validation_losses"] == summary(short_run)["validation_losses"]


def test_a_final_folder_without_its_weights_is_written_again(short_run: Path, tmp_path: Path, run_dsft: RunDsft):
    shutil.copytree(short_run, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    record = tmp_path / "copy" / "results_tiny" / "run.json"
    record.write_text(record.read_text().replace(str(short_run), str(tmp_path / "copy")))
    adapter = tmp_path / "copy" / "trained_tiny" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.unlink()
    done = run_dsft(*SHORT, "--resume", cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert adapter.read_bytes() == content


def test_a_last_validation_that_was_cut_short_is_made_up_for(short_run: Path, tmp_path: Path, run_dsft: RunDsft):
    shutil.copytree(short_run / "results_tiny", tmp_path / "results_tiny")
    last = tmp_path / "results_tiny" / "checkpoint-3"
    state = json.loads((last / "trainer_state.json").read_text())
    state["log_history"] = [log for log in state["log_history"] if not ("eval_loss" in log and log["step"] == 3)]

    def write_files(folder: Path) -> None:
        shutil.copytree(last, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (folder / "trainer_state.json").write_text(json.dumps(state))

    replace_folder(last, write_files)
    done = run_dsft(*SHORT, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["validation_losses"] == summary(short_run)["validation_losses"]


def test_keeping_the_best_needs_a_whole_best_adapter(short_run: Path, tmp_path: Path, run_dsft: RunDsft):
    shutil.copytree(short_run / "results_tiny", tmp_path / "results_tiny")
    (tmp_path / "results_tiny" / "adapter-best" / "adapter_model.safetensors").unlink()
    done = run_dsft(*SHORT, "--resume", "--keep", "best", cwd=tmp_path)
    assert done.returncode == 1
    assert "--keep last" in done.stderr
    assert not (tmp_path / "trained_tiny").exists()


def test_a_signal_to_the_whole_group_leaves_a_checkpoint(tmp_path: Path):
    """Service managers signal every process of a group, the ones that load data among them."""
    command = (*TINY, "--max-steps", "400", "--dataloader-num-workers", "1", "--json")
    with subprocess.Popen(
        [sys.executable, "-m", "dsft", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "StepDone":
                os.killpg(process.pid, signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 75, rest
    assert list((tmp_path / "results_tiny").glob("checkpoint-*"))


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_ends_the_same(
    longer_run: Path, tmp_path: Path, number: signal.Signals, name: str, run_dsft: RunDsft
):
    with subprocess.Popen(
        [sys.executable, "-m", "dsft", *LONGER, "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "StepDone" and event["step"] == 3:
                process.send_signal(number)
                break
        rest = process.stdout.read()
        code = process.wait(timeout=60)
    assert code == 75, rest
    assert name in rest
    assert list(live_runs_dir().iterdir()) == []
    checkpoints = [path.name for path in (tmp_path / "results_tiny").glob("checkpoint-*")]
    assert len(checkpoints) == 1

    resumed = run_dsft(*LONGER, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert summary(tmp_path)["losses"] == summary(longer_run)["losses"]
    assert (tmp_path / "trained_tiny" / "adapter_model.safetensors").read_bytes() == (
        longer_run / "trained_tiny" / "adapter_model.safetensors"
    ).read_bytes()


def test_dry_run_shows_configuration_data_and_a_sample_and_writes_nothing(tmp_path: Path, run_dsft: RunDsft):
    done = run_dsft(*TINY, "--dry-run", "--lora-r", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("--lora-r", "preset tiny", "### Response:", "instruction"):
        assert expected in done.stdout
    assert not list(tmp_path.iterdir())
    assert not live_runs_dir().exists()


BAD_FILES = {
    "empty.jsonl": ("", "empty"),
    "broken.jsonl": ('{"instruction": "a", "output": "b"}\n' * 6 + '{"instruction": "a", \n', r"broken.jsonl:7"),
    "columns.jsonl": ('{"foo": 1, "bar": 2}\n', "bar"),
    "response.jsonl": (
        '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\n',
        "response.jsonl:2",
    ),
    "long.jsonl": (json.dumps({"instruction": "a " * 3000, "output": "b " * 3000}) + "\n", "--max-length"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_named_by_file_and_line_and_nothing_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    content, expected = BAD_FILES[name]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = main([*TINY, "--dataset", str(path)])
    error = capfd.readouterr().err
    assert code == 2, error
    assert expected in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dataset", "missing.jsonl"), "missing.jsonl"),
        (("--lora-r", "0"), "--lora-r is 0"),
        (("--preset", "balance"), "balanced"),
        (("--model-name", "./missing"), "./missing"),
        (("--device", "cuda"), "--device cpu"),
        (("--use-flash-attention",), "flash"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tmp_path: Path,
    arguments: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    code = main([*TINY, *arguments])
    error = capfd.readouterr().err
    assert code == (5 if "cuda" in arguments else 2), error
    assert expected in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_unreachable_hub_names_the_ways_on(tmp_path: Path, run_dsft: RunDsft):
    done = run_dsft("train", "--preset", "balanced", cwd=tmp_path)
    assert done.returncode == 2
    assert "--model-name" in done.stderr and "--preset tiny" in done.stderr
    done = run_dsft(*TINY, "--dataset", "sahil2801/CodeAlpaca-20k", cwd=tmp_path)
    assert done.returncode == 2
    assert "--dataset" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_tiny_preset_learns_and_stops_by_itself(tmp_path: Path, run_dsft: RunDsft):
    """The whole demo: held-out response loss at least 30 % below the base's, answers that end."""
    done = run_dsft(*TINY, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    told = summary(tmp_path)
    first, last = told["validation_losses"][0][1], told["validation_losses"][-1][1]
    assert last <= 0.7 * first
    answer = run_dsft(
        "infer",
        "Write a Python function times_four(n) that returns n times 4.",
        "--json",
        cwd=tmp_path,
    )
    told = json.loads(answer.stdout)
    assert told["stop_reason"] == "end_token"
    assert told["text"].startswith("def times_four(n):")
