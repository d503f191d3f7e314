"""What is seen of a merge: bars and lines while it runs, every figure at its end, commands that can be pasted."""

import errno
import io
import itertools
import subprocess
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dsft.cli.output import Output
from dsft.cli.views.merge import render_merge
from dsft.cli.views.merge_live import open_merge_view
from dsft.cli.views.merge_progress import (
    PhaseProgress,
    ProgressChooser,
    advance,
    format_line,
    render_phases,
)
from dsft.core.data.example_question import example_question
from dsft.core.units import GIB
from dsft.merge.events import Notice, Progress
from dsft.merge.result import MergeResult
from tests.merge_results import make_merge_result

TOTAL = 10 * GIB


def after(*reports: tuple[float, Progress]) -> tuple[PhaseProgress, ...]:
    phases: tuple[PhaseProgress, ...] = ()
    for now_s, report in reports:
        phases = advance(phases, report, now_s)
    return phases


def merged(done_bytes: int) -> Progress:
    return Progress("merge", done_bytes, TOTAL)


# Rate and time left


def test_the_rate_and_the_time_left_follow_from_the_bytes() -> None:
    [phase] = after((100.0, merged(0)), (102.0, merged(2 * GIB)))
    assert phase.bytes_per_s == GIB
    assert phase.eta_s(102.0) == 8.0
    assert phase.eta_s(105.0) == 5.0  # counted down until the next report
    assert phase.eta_s(200.0) == 0.0


def test_the_rate_is_that_of_the_last_seconds() -> None:
    fast = [(second, merged(second * GIB // 4)) for second in range(20)]
    slow = [(19 + second, merged(19 * GIB // 4 + second * GIB // 100)) for second in range(1, 31)]
    [phase] = after(*fast, *slow)
    assert phase.bytes_per_s == pytest.approx(GIB / 100, rel=1e-6)
    assert len(phase.samples) < 25


def test_very_many_reports_are_not_all_kept() -> None:
    [phase] = after(*((number / 1000, merged(number * 1000)) for number in range(5000)))
    assert len(phase.samples) <= 10
    assert phase.done_bytes == 4999 * 1000
    assert phase.bytes_per_s == pytest.approx(1e6)


def test_before_a_second_report_there_is_no_rate() -> None:
    [phase] = after((1.0, merged(0)))
    assert phase.bytes_per_s is None
    assert phase.eta_s(2.0) is None


def test_a_finished_phase_tells_the_rate_of_the_whole() -> None:
    [phase] = after((0.0, merged(0)), (1.0, merged(9 * GIB)), (20.0, merged(9 * GIB)), (40.0, merged(TOTAL)))
    assert phase.is_done
    assert phase.bytes_per_s == TOTAL / 40
    assert phase.duration_s == 40.0


# Plain lines


def test_lines_can_be_grepped() -> None:
    reports = [(0.0, merged(0)), (4.0, merged(4 * GIB)), (9.0, merged(TOTAL))]
    lines = [format_line(after(*reports[: number + 1])[-1], reports[number][0]) for number in range(3)]
    assert lines == [
        "merging 10.0 GiB ...",
        "merging 4.0 of 10.0 GiB  1.07 GB/s  eta 6.0 s",
        "merging 10.0 of 10.0 GiB  1.19 GB/s  took 9.0 s",
    ]


@pytest.mark.parametrize(
    ("phase", "word"), [("merge", "merging"), ("write gguf", "writing gguf"), ("verify", "verifying")]
)
def test_each_phase_has_its_word(phase: Any, word: str) -> None:
    [progress] = after((0.0, Progress(phase, 0, 5 * 1024**2)))
    assert format_line(progress, 0.0) == f"{word} 5.0 MiB ..."


def test_a_phase_of_nothing_is_done_at_once() -> None:
    [phase] = after((0.0, Progress("verify", 0, 0)))
    assert format_line(phase, 0.0) == "verifying 0.0 of 0.0 MiB  took 0.0 s"
    assert "━" in draw_phases((phase,), 80)


def test_reports_are_thinned_but_for_first_and_last() -> None:
    chooser = ProgressChooser(1.0)
    reports = [Progress(phase, done, 50) for phase in ("merge", "verify") for done in range(51)]  # type: ignore[arg-type]
    told = [each for number, report in enumerate(reports) for each in chooser.choose(report, number * 0.1)]
    assert chooser.finish() == []
    for phase in ("merge", "verify"):
        done = [report.done_bytes for report in told if report.phase == phase]
        assert (done[0], done[-1]) == (0, 50)
        assert len(done) in {6, 7}
        assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(done[:-1]))


def test_a_phase_that_says_again_that_it_is_done_is_told_once() -> None:
    chooser = ProgressChooser(1.0)
    told = [chooser.choose(merged(done), number * 10.0) for number, done in enumerate((0, TOTAL, TOTAL, TOTAL))]
    assert told == [[merged(0)], [merged(TOTAL)], [], []]


def test_a_phase_cut_short_still_tells_its_last_report() -> None:
    chooser = ProgressChooser(1.0)
    chooser.choose(merged(0), 0.0)
    assert chooser.choose(merged(5), 0.1) == []
    verify = Progress("verify", 0, 10)
    assert chooser.choose(verify, 0.2) == [merged(5), verify]
    chooser.choose(Progress("verify", 3, 10), 0.3)
    assert chooser.finish() == [Progress("verify", 3, 10)]
    assert chooser.finish() == []


# On a console


class Terminal(io.StringIO):
    """Says of itself that it is one."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Goes on by so many seconds each time it is read."""

    def __init__(self, step_s: float) -> None:
        self._now_s = 0.0
        self._step_s = step_s

    def __call__(self) -> float:
        self._now_s += self._step_s
        return self._now_s


EVENTS: list[Notice | Progress] = [
    Notice("the newest run is trained_deepseek"),
    *(merged(number * GIB) for number in range(11)),
    Notice("little is left", "warning"),
    *(Progress("verify", number * GIB, TOTAL) for number in range(8)),
]


def show(file: io.StringIO, step_s: float = 1.0) -> str:
    with open_merge_view(Console(file=file, width=80), Clock(step_s)) as sink:
        for event in EVENTS:
            sink(event)
    return file.getvalue()


def test_a_file_gets_a_line_now_and_then_without_control_codes() -> None:
    lines = show(io.StringIO()).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "note: the newest run is trained_deepseek",
        "merging 10.0 GiB ...",
        "merging 5.0 of 10.0 GiB",
        "merging 10.0 of 10.0 GiB",
        "warning: little is left",
        "verifying 10.0 GiB ...",
        "verifying 5.0 of 10.0 GiB",
        "verifying 7.0 of 10.0 GiB",
    ]


def test_a_simple_terminal_gets_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in show(Terminal())


def test_a_terminal_gets_bars_and_notices_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    written = show(Terminal())
    assert "note: the newest run is trained_deepseek" in written
    assert "warning: little is left" in written
    assert "verifying" in written
    assert "\x1b[?25h" in written  # the cursor is back
    assert written.endswith("\x1b[2K")  # and the lines of the bars are erased


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_losing_the_screen_does_not_end_the_merge(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    class LostFile(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    num_taken = 0
    with open_merge_view(Console(file=LostFile(), width=80)) as sink:
        for event in EVENTS:
            sink(event)
            num_taken += 1
    assert num_taken == len(EVENTS)


def draw_phases(phases: tuple[PhaseProgress, ...], width: int, encoding: str = "utf-8", now_s: float = 4.0) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(render_phases(phases, width, now_s))
    file.seek(0)
    return file.read()


PHASES = after(
    (0.0, merged(0)),
    (2.0, merged(TOTAL)),
    (2.0, Progress("verify", 0, TOTAL)),
    (4.0, Progress("verify", 4 * GIB, TOTAL)),
)


def test_a_bar_for_each_phase_with_bytes_rate_and_time() -> None:
    first, second = draw_phases(PHASES, 100).splitlines()
    assert first.rstrip() == f"merging       {'━' * 40}  10.0 of 10.0 GiB · 5.37 GB/s · 2.0 s"
    assert second.rstrip() == f"verifying     {'━' * 16}{'─' * 24}  4.0 of 10.0 GiB · 2.15 GB/s · 3.0 s left"


def test_a_narrow_terminal_keeps_the_bytes_longest() -> None:
    drawn = [draw_phases(PHASES, width).splitlines()[1].split()[1:] for width in (60, 50, 40, 31)]
    bars = [words[0] == "━━━─────" for words in drawn]
    assert bars == [True, True, True, False]
    assert [" ".join(words[is_barred:]) for words, is_barred in zip(drawn, bars, strict=True)] == [
        "4.0 of 10.0 GiB · 2.15 GB/s",
        "4.0 of 10.0 GiB",
        "4.0 of 10.0 GiB",
        "4.0 of 10.0 GiB",
    ]


@pytest.mark.parametrize("width", [1, 5, 12, 20, 30, 38, 40, 50, 60, 90])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("phases", [PHASES, ()])
def test_a_bar_is_one_line_on_any_terminal(width: int, encoding: str, phases: tuple[PhaseProgress, ...]) -> None:
    lines = draw_phases(phases, width, encoding).splitlines()
    assert len(lines) == max(1, len(phases))
    assert all(cell_len(line) <= width for line in lines)
    if width >= 38 and phases:
        assert "4.0 of 10.0 GiB" in lines[1]


# The end


def draw(result: MergeResult, width: int = 100, encoding: str = "utf-8") -> str:
    """Return what `dsft merge` shows, all of it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    output = Output()
    output.stdout = Console(file=file, width=width)
    output.show(render_merge(result))
    file.seek(0)
    return file.read()


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_end_shows_all_that_is_known() -> None:
    drawn = squeezed(draw(make_merge_result()))
    for words in (
        "✓ trained_deepseek/merged_model is written",
        "base deepseek-ai/deepseek-coder-6.7b-base at 0123abc",
        "adapter trained_deepseek, changes 224 tensors",
        "weights 6,740,512,768 in bfloat16",
        "size 12.6 GiB in 3 files",
        "update 99.9 % left after rounding",
        "difference of a logit mean 0.00211, greatest 0.0312",
        "KL divergence mean 1.25e-06 nats, greatest 3.5e-05",
        "same likeliest token at 511 of 512 positions",
        "explained by rounding mean 0.00209",
        "not explained mean 1.23e-05",
        "merge 15 s, 0.90 GB/s written, on the CPU",
        "verification 8.0 s",
        "peak memory 1.6 GiB of host memory",
    ):
        assert words in drawn, words


def test_what_was_not_asked_for_is_not_shown() -> None:
    drawn = draw(make_merge_result(verification=None, verify_s=None, update_kept=None, base_revision=None))
    assert "left out by --no-verify" in drawn
    for word in ("KL", "update", "GGUF", "ollama", "None"):
        assert word not in drawn


def test_a_rounded_base_a_gpu_and_a_gguf_file_are_told() -> None:
    result = make_merge_result(base_rounding="nf4", device="cuda", gguf="m-f16.gguf", gguf_type="f16", gguf_s=12.0)
    drawn = squeezed(draw(result))
    assert "rounded to NF4 and back" in drawn
    assert "on a GPU" in drawn
    assert "GGUF m-f16.gguf, f16, with a Modelfile" in drawn
    assert "GGUF 12 s" in drawn


def test_a_merge_too_short_to_be_timed_shows_no_rate() -> None:
    assert "GB/s" not in draw(make_merge_result(merge_s=0.0))


def test_one_is_no_plural() -> None:
    drawn = draw(make_merge_result(shards=("model.safetensors",), num_updated_tensors=1, weight_bytes=3_700_000))
    assert "3.5 MiB in 1 file\n" in "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"
    assert "changes 1 tensor\n" in "\n".join(line.rstrip() for line in drawn.splitlines())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_next_commands_can_be_pasted_into_a_shell(width: int) -> None:
    result = make_merge_result(output="my models/first one", gguf="a.gguf", gguf_type="f16")
    drawn = draw(result, width)
    commands = drawn[drawn.index("Next") + len("Next") :]
    script = f"dsft() {{ printf '%s\\0' dsft \"$@\"; }}; ollama() {{ printf '%s\\0' ollama \"$@\"; }}\n{commands}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    expected = ["dsft", "infer", example_question("instruction"), "--model", "my models/first one"]
    expected += ["ollama", "create", "first-one", "-f", "my models/first one/Modelfile"]
    assert words.stdout.split("\0") == [*expected, ""]


@pytest.mark.parametrize("width", [1, 10, 40, 80, 200])
def test_an_ascii_console_and_a_narrow_one_get_it_too(width: int) -> None:
    drawn = draw(make_merge_result(gguf="a.gguf", gguf_type="f16"), width, encoding="ascii")
    assert drawn.isascii()
    assert "ollama create" in drawn
