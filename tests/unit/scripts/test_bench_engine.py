"""scripts/bench_engine.py without a GPU: options, rows, sides as processes that end well or not, the table."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"

FAKE = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
side, size = job["side"], job.get("micro_batch")
if side == "texts":
    open(job["texts"], "w").write("")
    result = {"status": "done"}
elif side == "ceiling":
    result = {"status": "done", "ceiling_flops": 1e6, "useful_flops_per_token": 1000, "seconds": 5}
elif side == "plain":
    print("the reason stands here", flush=True)
    sys.exit(3)
elif side == "seed":
    time.sleep(600)
elif size is not None and size > 2 and job["vram_gib"] < 10:
    result = {"status": "out_of_memory", "reason": "too large"}
else:
    step = {"engine": 0.5, "unsloth": 1.0}[side]
    now = time.time()
    steps = [{"step_s": step * factor, "num_tokens": 100} for factor in (1, 1, 9)]
    result = {"status": "done", "steps": steps, "first_step_s": now, "last_step_s": now, "versions": {"torch": "2"},
              "offline": os.environ["HF_HUB_OFFLINE"], "path": os.environ["PYTHONPATH"], "job": job}
json.dump(result, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def scripts():
    """Make the scripts importable for this file alone."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def bench(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import bench_engine

    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    monkeypatch.setattr(bench_engine, "command_of", lambda side: [sys.executable, str(fake)])
    monkeypatch.setattr(bench_engine, "LEAST_S", 0.0)
    return bench_engine


@pytest.fixture
def run(bench, tmp_path: Path):
    """Run the script with options; return its record."""

    def run_with(*options: str) -> dict:
        out = tmp_path / "out" / "result.json"
        places = ["--model", str(tmp_path), "--dataset", str(tmp_path), "--peers-path", str(tmp_path / "peers")]
        bench.main([*places, "--out", str(out), *options])
        return json.loads(out.read_text())

    return run_with


def test_rates_are_medians_and_the_table_holds_the_ratios(run, capsys) -> None:
    record = run("--rows", "ceiling,full,packed", "--sides", "engine,unsloth")
    found = {(each["row"], each["side"]): each for each in record["runs"]}
    assert found["full", "engine"]["tok_per_s"] == 200
    assert found["full", "unsloth"]["tok_per_s"] == 100
    assert found["packed", "unsloth"]["micro_batch"] == 8
    shown = capsys.readouterr().out
    assert "| dsft, engine |  | 200 | 0.500 s |  | 20.0% |" in shown
    assert "| Unsloth | 8 × 1,024 | 100 | 1.000 s | 2.00 × | 10.0% |" in shown


def test_a_side_gets_its_own_packages_and_no_network(run, tmp_path: Path) -> None:
    engine, unsloth = run("--rows", "full")["runs"]
    assert unsloth["path"] == str(tmp_path / "peers")
    assert str(SCRIPTS.parent) in engine["path"].split(":")
    assert engine["offline"] == "1"


def test_both_sides_get_the_same_recipe(run) -> None:
    engine, unsloth = run("--rows", "quality-real", "--steps", "3", "--warmup-steps", "2")["runs"]
    differing = {"side", "micro_batch", "texts", "used_before_bytes"}
    assert {**engine["job"], **dict.fromkeys(differing)} == {**unsloth["job"], **dict.fromkeys(differing)}
    assert engine["job"]["rank"] == 128
    assert engine["job"]["length"] == 2048
    assert engine["job"]["num_steps"] == 3
    assert engine["job"]["num_warmup_steps"] == 2
    assert unsloth["micro_batch"] == engine["effective_batch"] == 32


def test_a_side_that_fails_is_told_and_the_next_one_runs(run, capsys) -> None:
    record = run("--rows", "full", "--sides", "plain,unsloth")
    failed, done = record["runs"]
    assert failed["status"] == "failed"
    assert "ended with 3" in failed["reason"]
    assert "the reason stands here" in failed["log_tail"]
    assert done["status"] == "done"
    assert "| dsft, plain path |  | failed: ended with 3" in capsys.readouterr().out


def test_a_side_that_does_not_end_is_ended(run) -> None:
    [stuck] = run("--rows", "full", "--sides", "seed", "--side-seconds", "1")["runs"]
    assert stuck["status"] == "failed"
    assert "still running after 1 s" in stuck["reason"]


def test_nothing_begins_when_the_time_is_over(run) -> None:
    assert {each["status"] for each in run("--rows", "full", "--budget-seconds", "-1")["runs"]} == {"not_run"}


def test_on_a_small_card_unsloth_gets_the_largest_micro_batch_that_fits(run) -> None:
    [unsloth] = run("--rows", "card-8", "--sides", "unsloth")["runs"]
    assert unsloth["micro_batch"] == 2
    assert unsloth["status"] == "done"


def test_several_micro_batches_of_unsloth_are_runs_of_their_own(run) -> None:
    record = run("--rows", "full", "--sides", "unsloth", "--unsloth-micro-tokens", "4096,8192,16384")
    assert [each["micro_batch"] for each in record["runs"]] == [4, 8, 16]


def test_a_result_can_be_written_as_a_table_later(bench, run, tmp_path: Path, capsys) -> None:
    run("--rows", "full")
    at_the_end = capsys.readouterr().out
    bench.main(["--table", str(tmp_path / "out" / "result.json")])
    assert capsys.readouterr().out in at_the_end


@pytest.mark.parametrize(
    "options",
    [
        ["--rows", "fulll"],
        ["--sides", "engine,other"],
        ["--model", "m", "--out", "o", "--rows", "full"],
        ["--model", "m", "--out", "o", "--rows", "real", "--sides", "engine"],
        ["--model", "m", "--out", "o", "--rows", "full", "--sides", "engine", "--set", "engine"],
    ],
)
def test_options_that_do_not_go_are_refused(bench, options: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.parse(options)
    assert refused.value.code == 2


def test_unsloths_tokens_are_counted_in_the_order_of_its_micro_batches(scripts) -> None:
    import bench_engine_unsloth

    class Collator:
        def torch_call(self, examples):
            return len(examples)

    collator = Collator()
    counts = bench_engine_unsloth.count_tokens(collator)
    assert collator.torch_call([{"input_ids": [1, 2]}, {"input_ids": [3]}]) == 2
    assert collator.torch_call([{"input_ids": [1] * 7}]) == 1
    assert counts == [3, 7]


def test_texts_that_a_trainer_reads_otherwise_are_refused(scripts) -> None:
    import bench_engine_unsloth

    rows = {"input_ids": [[1] * 50, [1] * 50]}
    bench_engine_unsloth.check_tokens(rows, {"dsft_tokens": 101})
    with pytest.raises(ValueError, match="100 tokens of 130"):
        bench_engine_unsloth.check_tokens(rows, {"dsft_tokens": 130})
