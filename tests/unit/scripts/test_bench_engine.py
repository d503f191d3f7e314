"""scripts/bench_engine.py without a GPU: options, rows, sides as processes that end well or not, the table."""

import json
import re
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


def test_results_of_several_calls_are_kept_as_one_without_folders(bench, run, tmp_path: Path, capsys) -> None:
    kept, first = tmp_path / "kept.json", tmp_path / "first.json"
    first.write_text(json.dumps(run("--rows", "ceiling,full", "--sides", "engine,plain")))
    run("--rows", "full", "--sides", "unsloth")
    bench.main(["--table", str(first), str(tmp_path / "out" / "result.json"), "--keep", str(kept)])
    text = kept.read_text()
    assert str(tmp_path) not in text
    assert "the reason stands here" not in text
    capsys.readouterr()
    bench.main(["--table", str(kept)])
    shown = capsys.readouterr().out
    assert "| dsft, engine |  | 200 | 0.500 s |  | 20.0% |" in shown
    # Of another call: no ceiling was measured in it, and the ratio is marked.
    assert "| Unsloth | 8 × 1,024 | 100 | 1.000 s | 2.00 ×\\* |  |" in shown
    again = tmp_path / "again.json"
    bench.main(["--table", str(kept), "--keep", str(again)])
    assert again.read_text() == text


def test_results_of_different_gpus_are_not_joined(scripts) -> None:
    import bench_engine_table

    with pytest.raises(SystemExit, match="A, B"):
        bench_engine_table.join([{"gpu": {"name": name}, "command": [], "runs": []} for name in "AB"])


def test_tables_go_into_the_places_of_pages(bench, run, tmp_path: Path) -> None:
    run("--rows", "full", "--sides", "engine,unsloth")
    english, portuguese = tmp_path / "page.md", tmp_path / "page.pt-BR.md"
    for page in (english, portuguese):
        page.write_text("before\n<!-- table speed -->\nold\n<!-- end -->\n<!-- table goals -->\n<!-- end -->\nafter\n")
    bench.main(["--table", str(tmp_path / "out" / "result.json"), "--write", str(english), str(portuguese)])
    text = english.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| full sequences | 200 | 100 | not measured | 2.00 × |  |" in text
    assert "| full sequences, by Unsloth | 1.6 × | 2.00 × | reached |" in text
    assert "| full sequences, by the usual recipe | 9.0 × | not measured |  |" in text
    assert "| sequências cheias | 200 | 100 | não medido | 2,00 × |  |" in portuguese.read_text()


def test_a_goal_is_judged_by_the_best_of_the_other_side(scripts) -> None:
    from bench_engine_pages import judge

    runs = [{"row": "real", "side": side, "tok_per_s": rate} for side, rate in (("engine", 390), ("unsloth", 50))]
    assert "| real data, by Unsloth | 4.0 × | 7.80 × | reached |" in judge(runs)
    runs.append({"row": "real", "side": "unsloth", "tok_per_s": 100})
    assert "| real data, by Unsloth | 4.0 × | 3.90 × | **missed** |" in judge(runs)


def test_peaks_stand_beside_their_predictions(scripts) -> None:
    from bench_engine_pages import compare_peaks

    peaks = {f"{figure}_bytes": 2**30 for figure in ("allocated", "reserved", "device")}
    run = {"row": "full", "side": "engine", "measured": peaks, "predicted": {**peaks, "device_bytes": 2**29}}
    others = [{"row": "full", "side": "engine", "measured": None}, {"row": "full", "side": "unsloth"}]
    *_, last = compare_peaks([run, *others]).splitlines()
    assert last == "| full | 1.00 / 1.00 (0.00 %) | 1.00 / 1.00 (0.00 %) | 1.00 / 0.50 (−50.00 %) |"


@pytest.mark.parametrize("text", ["no place", "<!-- table other -->\n<!-- end -->"])
def test_a_page_without_a_place_for_a_table_is_refused(scripts, tmp_path: Path, text: str) -> None:
    from bench_engine_pages import write_pages

    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match="place for"):
        write_pages({"runs": [], "gpu": {}, "num_cpus": 1, "python": "3"}, [page])
    assert page.read_text() == text


def test_the_committed_pages_are_what_the_script_makes_of_the_record(bench, repository: Path, tmp_path: Path) -> None:
    """Fails when the record was exchanged; the command that writes them stands in scripts/bench_engine.py."""
    pages = ["docs/benchmarks/engine.md", "README.md", "README.pt-BR.md"]
    copies = [tmp_path / Path(page).name for page in pages]
    for page, copy in zip(pages, copies, strict=True):
        copy.write_text((repository / page).read_text(encoding="utf-8"), encoding="utf-8")
    record = repository / "docs" / "benchmarks" / "engine-6.7b-h100.json"
    bench.main(["--table", str(record), "--write", *map(str, copies)])
    for page, copy in zip(pages, copies, strict=True):
        assert copy.read_text(encoding="utf-8") == (repository / page).read_text(encoding="utf-8"), page


def test_the_committed_picture_has_the_rates_of_the_record(scripts, repository: Path, tmp_path: Path) -> None:
    """Fails when the record was exchanged: `python scripts/plot_engine.py` draws it anew."""
    import plot_engine

    record = json.loads((repository / "docs/benchmarks/engine-6.7b-h100.json").read_text(encoding="utf-8"))
    drawn = tmp_path / "drawn.svg"
    plot_engine.draw(record, drawn)
    pictures = [drawn, repository / "docs" / "images" / "engine-speed.svg"]
    now, committed = (re.findall(r"<text[^>]*>([^<]*)", each.read_text(encoding="utf-8")) for each in pictures)
    assert now == committed
    rates = [f"{run['tok_per_s']:,.0f}" for run in record["runs"] if run["side"] == "engine" and "tok_per_s" in run]
    assert rates
    assert set(rates) <= set(now)


@pytest.mark.parametrize(
    "options",
    [
        ["--rows", "fulll"],
        ["--sides", "engine,other"],
        ["--model", "m", "--out", "o", "--rows", "full"],
        ["--model", "m", "--out", "o", "--rows", "real", "--sides", "engine"],
        ["--model", "m", "--out", "o", "--rows", "full", "--sides", "engine", "--set", "engine"],
        ["--model", "m", "--out", "o", "--rows", "full", "--sides", "engine", "--keep", "record.json"],
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
