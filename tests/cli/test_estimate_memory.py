"""`dsft estimate-memory`: what it prints, what it refuses, its exit codes, and what it must not load."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsft.cli.app import main
from dsft.core.units import GIB
from tests.unit.estimate_memory.estimates import FakeDriver, install, write_model

HEAVY = {"torch", "numpy", "transformers", "peft", "bitsandbytes", "datasets", "huggingface_hub", "pyarrow", "trl"}

RUN_AND_LIST_MODULES = """
import json, sys
from dsft.cli.app import main
code = main(["estimate-memory", *sys.argv[1:]])
print(json.dumps([code, [name for name in sys.modules if "." not in name]]))
"""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, FakeDriver())
    monkeypatch.chdir(tmp_path)


def read_json(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert main(["estimate-memory", *args, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("args", [[], ["--preset", "balanced", "--max-length", "auto"], ["--vram", "6", "--fit"]])
def test_it_loads_nothing_heavy(repository: Path, tmp_path: Path, args: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    completed = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, *args],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    code, modules = json.loads(completed.stdout.splitlines()[-1])
    assert code == (3 if "--fit" in args else 0)
    assert not HEAVY & set(modules)


def test_without_options_it_is_the_table_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate-memory"]) == 0
    text = capsys.readouterr().out
    assert "no GPU here: planned for an RTX 4090, 23.5 GiB usable of 24,564 MiB" in " ".join(text.split())
    for name in ("conservative", "balanced", "quality"):
        assert f"{name}: " in text
    assert "tiny trains on the CPU" in text


def test_the_card_alone_leaves_it_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    for args, total in ((["--vram", "12"], 12 * GIB), (["--gpu", "rtx 3060"], 12288 * 1024**2)):
        record = read_json(capsys, *args)
        assert [preset["preset"] for preset in record["presets"]] == ["conservative", "balanced", "quality"]
        assert record["budget"]["total_bytes"] == total


def test_the_gpu_that_is_there_is_planned_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {"name": "NVIDIA GeForce RTX 3090", "uuid": "GPU-a", "total": 24 * GIB, "used": 14 * GIB}
    install(monkeypatch, FakeDriver(gpu | {"capability": (8, 6), "cores": 82 * 128}))
    assert read_json(capsys)["budget"]["budget_bytes"] == 10 * GIB
    assert main(["estimate-memory"]) == 0
    assert "GPU 0, RTX 3090: 10.0 GiB free of 24,576 MiB" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("args", [["--preset", "quality"], ["--lora-r", "8"], ["--config", "my.yaml"]])
def test_a_setting_makes_it_a_breakdown(capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "my.yaml").write_text("max_length: 256\n", encoding="utf-8")
    record = read_json(capsys, *args)
    plan = record["plan"]
    assert sum(term["bytes"] for term in plan["terms"]) == plan["device_bytes"]
    assert record["settings"]["max_length"] == (256 if "--config" in args else 2048 if "--preset" in args else 1024)
    assert main(["estimate-memory", *args]) == 0
    text = capsys.readouterr().out
    for term in plan["terms"]:
        assert term["name"] in text


def test_the_memory_of_a_file_and_a_card_by_name_contradict_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text("lora_r: 8\nvram: 12\n", encoding="utf-8")
    assert read_json(capsys, "--config", "my.yaml")["budget"]["origin"] == "vram"
    assert main(["estimate-memory", "--config", "my.yaml", "--gpu", "A10"]) == 2
    assert "my.yaml:2: vram and --gpu both say which card to plan for." in capsys.readouterr().err


def test_execution_settings_are_honoured(capsys: pytest.CaptureFixture[str]) -> None:
    plan = read_json(capsys, "--micro-batch", "4", "--recompute-blocks", "30", "--page-optimizer", "yes")["plan"]
    assert (plan["micro_batch_size"], plan["recomputed_blocks"], plan["pages_optimizer"]) == (4, 30, True)
    record = read_json(capsys, "--plan", "off")
    assert record["plan"] == record["as_written"]
    assert record["plan"]["recomputed_blocks"] == 32


def test_the_table_is_the_data_and_quietly_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--preset", "balanced"]):
        assert main(["estimate-memory", *args]) == 0
        table = capsys.readouterr().out
        assert "GiB" in table
        assert main(["estimate-memory", "--quiet", *args]) == 0
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == (table, "")


@pytest.mark.parametrize("word", ["auto", "AUTO", "Auto"])
def test_auto_is_taken_however_it_is_written(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert read_json(capsys, "--max-length", word, "--vram", "8")["is_longest_length"]


def test_help_says_that_the_length_can_be_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate-memory", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Longest sequence in tokens. Or auto: the longest that fits." in words
    assert main(["train", "--help"]) == 0
    assert "Or auto" not in capsys.readouterr().out


def test_the_longest_length_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    record = read_json(capsys, "--max-length", "auto", "--vram", "8", "--fit")
    length = record["settings"]["max_length"]
    assert record["is_longest_length"]
    assert record["fits"]
    assert length % 64 == 0
    assert not read_json(capsys, "--max-length", str(length + 64), "--vram", "8")["fits"]
    assert main(["estimate-memory", "--max-length", "auto", "--vram", "8"]) == 0
    assert f"{length:,} tokens, the longest that fits" in capsys.readouterr().out


def test_a_local_model_s_config_is_enough(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = write_model(tmp_path / "model")
    assert read_json(capsys, "--model-name", name)["plan"]["num_blocks"] == 4


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--fit"], 0),
        (["--fit", "--vram", "6"], 3),
        (["--vram", "6"], 0),
        (["--fit", "--preset", "conservative"], 0),
        (["--fit", "--preset", "conservative", "--vram", "5"], 3),
        (["--fit", "--max-length", "auto"], 0),
        (["--max-length", "auto", "--vram", "3"], 3),
    ],
)
def test_fit_answers_with_the_exit_code(capsys: pytest.CaptureFixture[str], args: list[str], code: int) -> None:
    assert main(["estimate-memory", "--quiet", *args]) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == (["error", "hint"] if code else [])


def test_a_refused_fit_says_by_how_much_and_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--fit", "--vram", "10", "--plan", "off", "--no-gradient-checkpointing", "--max-length", "2048"]
    assert main(["estimate-memory", *args, "--json"]) == 3
    captured = capsys.readouterr()
    estimate, told = (json.loads(line) for line in captured.out.splitlines())
    needed, allowed = (round(size / GIB, 1) for size in (estimate["plan"]["needed_bytes"], estimate["allowed_bytes"]))
    assert f"needs {needed} GiB, {needed - allowed:.1f} GiB more than the {allowed} GiB" in told["error"]["found"]
    first = next(remedy for remedy in estimate["remedies"] if remedy["fits"])
    assert first["change"].startswith("--recompute-blocks")
    assert f"Enough would be {first['change']} (saves {first['saved_bytes'] / GIB:.1f} GiB)" in told["error"]["fix"]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["--vram", "0"], "--vram is 0"),
        (["--vram", "much"], "--vram is much"),
        (["--vram", "1e308"], "--vram is 1e308, but must be a number above 0 and at most 4096"),
        (["--vram", "8", "--gpu", "A10"], "--vram and --gpu both"),
        (["--gpu", "Voodoo 2"], "'Voodoo 2' is no card"),
        (["--max-length", "automatic"], "--max-length is automatic"),
        (["--lora-r", "0", "--max-length", "auto"], "--lora-r is 0"),
        (["--preset", "quallity"], "no preset 'quallity'"),
        (["--model-name", "./nowhere"], "no model folder ./nowhere"),
        (["--model-name", "./gemma"], "family gemma"),
        (["--model-name", "./odd"], "model_type must be text, and is ['llama']"),
        (["--model-name", "./endless"], "num_hidden_layers is more than 1,000"),
        (["--max-length", "20000"], "20000 is more than the 16384 positions"),
        (["--gpu", "T4", "--precision", "bf16"], "T4 has no bfloat16"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], found: str
) -> None:
    write_model(tmp_path / "gemma", model_type="gemma")
    write_model(tmp_path / "odd", model_type=["llama"])
    write_model(tmp_path / "endless", num_hidden_layers=10**12)
    assert main(["estimate-memory", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert found in error
    assert hint.startswith("hint: ")
