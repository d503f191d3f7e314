"""What a data set holds, what becomes of it, and one sample with its loss mask, for people to check before training."""

import unicodedata
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsft.cli.views.ascii import AsciiFallback
from dsft.cli.views.drawing import count_nouns
from dsft.core.data.report import BadRows, DataReport, SamplePreview
from dsft.core.data.segments import CONTROL_SPELLING, UNMARKED_CONTROL_TOKENS
from dsft.core.units import format_count, format_duration

_TARGET_STYLE = "bold green"
_CONTROL_STYLE = "magenta"
_INVISIBLE_STYLE = "dim"

_MAX_LINES = 48
"""Lines of a sample that are shown; a longer one loses its middle."""

_MAX_LINE_CHARACTERS = 2000

_Row = tuple[str, Text]


# The report


def render_data_report(report: DataReport) -> RenderableType:
    """Draw what was read, what is used, and what was left out for which reason and where."""
    parts = [_section("Data", _report_rows(report))]
    if report.validation is not None:
        parts.append(_section("Validation data", _report_rows(report.validation)))
    return AsciiFallback(Group(*parts))


def _section(title: str, rows: list[_Row]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", min_width=14)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return Group(Text(f"\n{title}", "bold cyan"), Padding(table, (0, 0, 0, 2)))


def _report_rows(report: DataReport) -> list[_Row]:
    columns = f" (columns {', '.join(report.columns)})" if report.columns else ""
    rows: list[_Row] = [
        ("data set", Text(report.dataset)),
        ("layout", Text(f"{report.layout}{columns}")),
        *([("unused columns", Text(", ".join(report.unused_columns)))] if report.unused_columns else []),
        ("template", Text(report.template)),
        ("rows", Text(f"{format_count(report.num_rows)} read, {format_count(report.num_used_rows)} used")),
        *_left_out_rows(report),
        ("samples", Text(_format_samples(report))),
        ("tokens", Text(_format_tokens(report))),
    ]
    if report.lengths is not None:
        lengths = report.lengths
        quantiles = f"median {lengths.median:,} · 90 % up to {lengths.p90:,} · 99 % up to {lengths.p99:,}"
        rows.append(("sample length", Text(f"mean {lengths.mean:,.0f} · {quantiles} · longest {lengths.longest:,}")))
    rows += [("end and target", _format_ends(report)), *_remark_rows(report), ("tokenized", Text(_format_time(report)))]
    return rows


def _left_out_rows(report: DataReport) -> list[_Row]:
    texts = [_format_bad_rows(bad) for bad in report.bad_rows]
    for count, words in (
        (report.num_over_length, "longer than the longest sequence"),
        (report.num_no_room, "the prompt alone fills the longest sequence"),
        (report.num_left_out_windows, "parts of source texts without a gap that fits"),
    ):
        if count:
            texts.append(Text.assemble((format_count(count), "yellow"), f": {words}"))
    for reason, count in report.files_left_out.items():
        texts.append(Text(f"{count_nouns(count, 'file')}: {reason}", "dim"))
    return [("" if position else "left out", text) for position, text in enumerate(texts)]


def _format_bad_rows(bad: BadRows) -> Text:
    more = ", …" if bad.count > len(bad.places) else ""
    text = Text.assemble((format_count(bad.count), "yellow"), f": {bad.reason}")
    return text.append(f"  {', '.join(bad.places)}{more}", "dim")


def _format_samples(report: DataReport) -> str:
    text = format_count(report.num_samples)
    if report.num_train_samples:
        text += f": {format_count(report.num_train_samples)} to train on"
    if report.num_validation_samples:
        text += f", {format_count(report.num_validation_samples)} for validation"
    return text


def _format_tokens(report: DataReport) -> str:
    targets = report.num_target_tokens
    share = targets / max(report.num_tokens, 1)
    text = f"{format_count(targets)} of them {_carry(targets)} loss ({share * 100:.0f} %)"
    return f"{format_count(report.num_tokens)}; {text}"


def _carry(count: int) -> str:
    return "carries" if count == 1 else "carry"


def _format_ends(report: DataReport) -> Text:
    text = Text()
    for position, (count, words) in enumerate(
        (
            (report.num_truncated, "truncated"),
            (report.num_without_end, "without a learned end token"),
            (report.num_without_target, "without a target"),
        )
    ):
        text.append(" · " if position else "").append(format_count(count), "yellow" if count else "").append(
            f" {words}"
        )
    return text


def _remark_rows(report: DataReport) -> list[_Row]:
    rows = []
    if report.num_split:
        rows.append(("split", Text(f"{count_nouns(report.num_split, 'text')} became several samples")))
    if report.num_repeated_prompts:
        repeated = count_nouns(report.num_repeated_prompts, "sample")
        rows.append(("repeated", Text(f"{repeated} with an earlier row's prompt")))
    for position, remark in enumerate(report.remarks):
        rows.append(("" if position else "remarks", Text(remark, "yellow")))
    return rows


def _format_time(report: DataReport) -> str:
    if report.is_from_cache:
        return f"earlier, read from the cache in {format_duration(report.seconds)}"
    return f"in {format_duration(report.seconds)}, {format_count(report.rows_per_s)} rows/s"


# One sample


def render_sample(preview: SamplePreview) -> RenderableType:
    """Draw a sample with the tokens that carry loss marked by colour, by brackets and at the left edge."""
    title = Text.assemble(
        ("\nSample", "bold cyan"),
        f"  row {preview.row} (counted from 0), {count_nouns(preview.num_tokens, 'token')}, "
        f"{format_count(preview.num_target_tokens)} {_carry(preview.num_target_tokens)} loss",
    )
    legend = Text.assemble(
        "  ", ("▌⟦carries loss⟧", _TARGET_STYLE), "   given   ", ("<control token>", _CONTROL_STYLE),
        ("   ↵ line end   ⇥ tab", _INVISIBLE_STYLE),
    )  # fmt: skip
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    for has_target, line in _shorten(_split_lines(preview)):
        grid.add_row(Text("▌" if has_target else " ", _TARGET_STYLE), line)
    return AsciiFallback(Group(title, legend, Padding(grid, (1, 0, 0, 2))))


def _split_lines(preview: SamplePreview) -> list[tuple[bool, Text]]:
    """Return the lines of a sample and whether any of their tokens carries loss."""
    lines: list[tuple[bool, Text]] = []
    line, has_target = Text(), False
    for text, style, is_target in _mark(preview):
        has_target = has_target or is_target
        for position, part in enumerate(text.split("\n")):
            if position:
                line.append("↵", _INVISIBLE_STYLE)
                lines.append((has_target, line))
                # The rest of the piece, if there is one, is of the same kind.
                line, has_target = Text(), is_target and bool(part)
            line.append(_make_visible(part), style)
    return [*lines, (has_target, line)] if line.plain else lines


def _mark(preview: SamplePreview) -> Iterator[tuple[str, str, bool]]:
    """Yield the text, style and loss flag of each piece, with a bracket before and after each run of targets."""
    was_target = False
    for text, is_target in preview.pieces:
        if is_target != was_target:
            yield "⟦" if is_target else "⟧", _TARGET_STYLE, is_target
        style = _TARGET_STYLE if is_target else ""
        yield text, f"{style} {_CONTROL_STYLE}".strip() if _is_control(text) else style, is_target
        was_target = is_target
    if was_target:
        yield "⟧", _TARGET_STYLE, False


def _is_control(piece: str) -> bool:
    # Ordinary text that looks like a control token is several tokens, and so several pieces.
    return piece in UNMARKED_CONTROL_TOKENS or CONTROL_SPELLING.fullmatch(piece) is not None


def _make_visible(text: str) -> str:
    """Return a text without characters that would move the cursor, change colours or hide others."""
    if text.isprintable():
        return text
    return "".join(_escape(character) for character in text.replace("\t", "⇥   "))


def _escape(character: str) -> str:
    if unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _shorten(lines: list[tuple[bool, Text]]) -> list[tuple[bool, Text]]:
    for _, line in lines:
        line.truncate(_MAX_LINE_CHARACTERS, overflow="ellipsis")
    if len(lines) <= _MAX_LINES:
        return lines
    half = _MAX_LINES // 2
    gap = Text(f"… {count_nouns(len(lines) - 2 * half, 'more line')} …", _INVISIBLE_STYLE)
    return [*lines[:half], (False, gap), *lines[-half:]]
