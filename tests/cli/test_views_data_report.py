"""The data report and the sample: counts and places, and a loss mask that reads without colour."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from dsft.cli.views.data_report import render_data_report, render_sample
from dsft.core.data.report import BadRows, DataReport, LengthSummary, SamplePreview


def draw(renderable: RenderableType, width: int = 100, encoding: str = "utf-8", **options: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, **options).print(renderable)
    file.seek(0)
    return file.read()


def squeezed(text: str) -> str:
    return " ".join(text.split())


def make_report(**changes: Any) -> DataReport:
    fields: dict[str, Any] = {
        "dataset": "data/tasks.jsonl",
        "layout": "instruction/input/output",
        "columns": ["instruction", "output"],
        "template": "instruction",
        "num_rows": 1210,
        "num_used_rows": 1200,
        "num_samples": 1200,
        "num_tokens": 180_000,
        "num_target_tokens": 90_000,
        "num_train_samples": 1176,
        "num_validation_samples": 24,
        "lengths": LengthSummary(150.2, 140, 250, 400, 1020),
        "seconds": 2.0,
        "rows_per_s": 605.0,
    }
    return DataReport(**(fields | changes))


def make_preview(*pieces: tuple[str, bool]) -> SamplePreview:
    return SamplePreview(list(pieces), len(pieces), sum(is_target for _, is_target in pieces), 17)


SAMPLE = make_preview(
    ("<s>", False), ("### Response:", False), ("\n", False), ("def f():", True), ("\n\t", True), ("return 1", True),
    ("</s>", True),
)  # fmt: skip


def sample_lines(preview: SamplePreview, **options: Any) -> list[str]:
    """Return the lines of the sample itself, without title and legend."""
    return [line.rstrip() for line in draw(render_sample(preview), **options).split("\n")[4:] if line.strip()]


# The report


def test_counts_what_was_read_used_and_learned() -> None:
    drawn = squeezed(draw(render_data_report(make_report())))
    for words in (
        "instruction/input/output (columns instruction, output)",
        "1,210 read, 1,200 used",
        "1,200: 1,176 to train on, 24 for validation",
        "180,000; 90,000 of them carry loss (50 %)",
        "mean 150 · median 140 · 90 % up to 250 · 99 % up to 400 · longest 1,020",
        "0 truncated · 0 without a learned end token · 0 without a target",
        "in 2.0 s, 605 rows/s",
    ):
        assert words in drawn, words
    assert "left out" not in drawn


def test_says_why_and_where_rows_were_left_out() -> None:
    report = make_report(
        bad_rows=[
            BadRows("the response is empty", 7, ["tasks.jsonl:3", "tasks.jsonl:9"]),
            BadRows("the row is no object", 1, ["tasks.jsonl:5"]),
        ],
        num_over_length=2,
        files_left_out={"too large": 4},
    )
    drawn = squeezed(draw(render_data_report(report)))
    assert "left out 7: the response is empty tasks.jsonl:3, tasks.jsonl:9, …" in drawn
    assert "1: the row is no object tasks.jsonl:5 2: longer than the longest sequence 4 files: too large" in drawn


def test_names_what_is_dangerous() -> None:
    report = make_report(num_truncated=3, num_without_end=3, num_without_target=1)
    drawn = squeezed(draw(render_data_report(report)))
    assert "3 truncated · 3 without a learned end token · 1 without a target" in drawn


def test_shows_every_remark_and_the_columns_nothing_is_made_of() -> None:
    report = make_report(
        remarks=["No samples are held out.", "5 prompts are also trained on."], unused_columns=["id", "url"]
    )
    drawn = squeezed(draw(render_data_report(report)))
    assert "remarks No samples are held out. 5 prompts are also trained on." in drawn
    assert "unused columns id, url" in drawn
    assert "remarks" not in draw(render_data_report(make_report()))


def test_one_of_a_kind_is_no_plural() -> None:
    report = make_report(num_target_tokens=1, num_split=1, num_repeated_prompts=1, files_left_out={"too large": 1})
    drawn = squeezed(draw(render_data_report(report)))
    for words in ("1 of them carries loss", "1 text became", "1 sample with an earlier row's prompt", "1 file: too"):
        assert words in drawn, words
    assert "1 token, 1 carries loss" in draw(render_sample(make_preview(("a", True))))
    assert "1 more line …" in draw(render_sample(make_preview(*[("a\n", True)] * 48)))


def test_tells_a_cached_start_and_a_validation_set_of_its_own() -> None:
    report = make_report(is_from_cache=True, validation=make_report(dataset="data/held_out.jsonl"))
    drawn = squeezed(draw(render_data_report(report)))
    assert "read from the cache" in drawn
    assert "Validation data data set data/held_out.jsonl" in drawn


def test_a_data_set_without_samples_is_drawn() -> None:
    report = make_report(num_samples=0, num_tokens=0, num_target_tokens=0, lengths=None, num_train_samples=0)
    assert "0; 0 of them carry loss (0 %)" in draw(render_data_report(report))


# The sample


def test_targets_are_marked_without_colour() -> None:
    assert sample_lines(SAMPLE) == [
        "    <s>### Response:↵",
        "  ▌ ⟦def f():↵",
        "  ▌ ⇥   return 1</s>⟧",
    ]


def test_marks_and_invisible_characters_have_ascii_forms() -> None:
    drawn = draw(render_sample(SAMPLE), encoding="ascii")
    assert "?" not in drawn
    assert sample_lines(SAMPLE, encoding="ascii") == [
        "    <s>### Response:$",
        "  > [def f():$",
        "  > >   return 1</s>]",
    ]


def test_targets_are_coloured_and_the_rest_is_not() -> None:
    drawn = draw(render_sample(SAMPLE), force_terminal=True, color_system="standard")
    assert "\x1b[1;32mdef f():" in drawn
    assert "### Response:\x1b" in drawn
    assert "\x1b[1;32m### Response:" not in drawn


def test_control_tokens_stand_out_and_texts_that_look_like_them_do_not() -> None:
    preview = make_preview(("<|EOT|>", False), ("<", False), ("|EOT|>", False), ("<｜fim▁hole｜>", True))
    drawn = draw(render_sample(preview), force_terminal=True, color_system="standard")
    body = drawn.split("\n", 4)[4]
    assert body.count("\x1b[35m<|EOT|>") == 1
    assert "\x1b[1;35m<｜fim▁hole｜>" in body


def test_each_run_of_targets_is_bracketed() -> None:
    preview = make_preview(("a", False), ("b", True), ("c", False), ("d", True))
    assert sample_lines(preview) == ["  ▌ a⟦b⟧c⟦d⟧"]


@pytest.mark.parametrize("is_target", [True, False])
def test_a_target_that_is_only_a_line_end_marks_its_own_line_alone(is_target: bool) -> None:
    lines = sample_lines(make_preview(("a", False), ("\n", is_target), ("b", False)))
    assert ("▌" in lines[0]) is is_target
    assert "▌" not in lines[1]


def test_nothing_in_the_data_reaches_the_terminal_as_a_command() -> None:
    drawn = draw(render_sample(make_preview(("\x1b[31mred\x07\x9b2J", True), ("\u202eabc\r", False))))
    assert "\x1b" not in drawn
    assert "\\x1b[31mred\\x07\\x9b2J" in drawn
    assert "\\u202eabc\\x0d" in drawn


def test_a_long_sample_loses_its_middle_and_says_so() -> None:
    lines = sample_lines(make_preview(*((f"line {number}\n", True) for number in range(500))))
    assert len(lines) < 60
    assert "line 0↵" in lines[0]
    assert any("453 more lines" in line for line in lines)
    assert "line 499↵" in "".join(lines[-2:])


def test_a_very_long_line_is_cut() -> None:
    assert len(draw(render_sample(make_preview(("x" * 100_000, True))))) < 5000


def test_a_real_tokenizer_s_sample_reads_as_the_text(shared: Any) -> None:
    from transformers import AutoTokenizer

    from dsft.core.data.report import preview_sample
    from dsft.core.data.samples import Sample

    tokenizer = AutoTokenizer.from_pretrained(str(shared / "assets" / "deepseek-coder-6.7b"))
    given, learned = tokenizer("Say é 模型\n")["input_ids"], tokenizer("  ok\n", add_special_tokens=False)["input_ids"]
    token_ids = np.array([*given, *learned, tokenizer.eos_token_id])
    is_target = np.arange(len(token_ids)) >= len(given)
    lines = sample_lines(preview_sample(Sample(token_ids, is_target, 0), tokenizer))
    assert lines == [
        f"    {tokenizer.bos_token}Say é 模型↵",
        "  ▌ ⟦  ok↵",
        f"  ▌ {tokenizer.eos_token}⟧",
    ]
