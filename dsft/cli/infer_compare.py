"""`dsft infer --compare`: base and adapter answer the same prompt; drawn when both have, or what there is of them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from dsft.cli.errors import Terminated
from dsft.cli.infer_answer import make_visible
from dsft.cli.output import Mode, Output
from dsft.cli.views.infer_compare import SIDE_NAMES, Section, draw_sections, list_sections, write_sections
from dsft.cli.views.infer_statistics import describe_statistics
from dsft.core.errors import DsftError

if TYPE_CHECKING:
    from dsft.infer.compare import Comparison, Side
    from dsft.infer.config import InferConfig


def compare(config: "InferConfig", output: Output, prompt: str) -> None:
    """Answer a prompt with the base model alone and with the adapter.

    Args:
        config: Which adapter answers, and how.
        output: Where the answers go.
        prompt: What is asked.

    Raises:
        DsftError: The model has no adapter, or one of the answers could not be generated; the other is on stdout.
        KeyboardInterrupt: Ctrl-C; what was answered by then is on stdout.
    """
    names: dict[Side, str] = {}
    pieces: dict[Side, list[str]] = {"base": [], "adapter": []}
    try:
        with _open_progress(output) as show:
            from dsft.infer.compare import run_compare

            def take(side: "Side", text: str) -> None:
                pieces[side].append(text)  # before it is shown: an interrupt may come inside that
                show(side, text)

            comparison = run_compare(config, prompt, names.__setitem__, take, output.note)
    except (KeyboardInterrupt, Terminated, DsftError):
        _write(output, [Section(side, name, "".join(pieces[side])) for side, name in names.items() if pieces[side]])
        raise
    _write(output, list_sections(comparison))
    output.emit(asdict(comparison))
    _tell(comparison, output)


def _write(output: Output, sections: Sequence[Section]) -> None:
    if not sections:
        return
    if sys.stdout.isatty():
        output.answer(draw_sections(sections, make_visible))
    else:
        output.write(write_sections(sections))


def _tell(comparison: "Comparison", output: Output) -> None:
    output.note(f"{SIDE_NAMES['base']}: {describe_statistics(comparison.base, with_process=False)}")
    output.note(f"{SIDE_NAMES['adapter']}: {describe_statistics(comparison.adapter)}")
    if comparison.base.text == comparison.adapter.text:
        output.note("Both answers are the same.")


@contextmanager
def _open_progress(output: Output) -> "Iterator[Callable[[Side, str], None]]":
    """Tell which of them is answering: in a line that goes away again, or where there is no terminal in one of each."""
    if output.mode is not Mode.HUMAN:
        yield lambda _side, _text: None
        return
    begun: set[Side] = set()
    if not output.stderr.is_terminal or output.stderr.is_dumb_terminal:

        def tell(side: "Side", _text: str) -> None:
            if side not in begun:
                begun.add(side)
                output.note(f"{SIDE_NAMES[side]} is answering.")

        yield tell
        return
    with output.stderr.status("Loading the model ...", spinner="line") as status:

        def show(side: "Side", text: str) -> None:
            num_chars[side] += len(text)
            status.update(f"{SIDE_NAMES[side]} is answering ({num_chars[side]} characters) ...")

        num_chars: dict[Side, int] = {"base": 0, "adapter": 0}
        yield show
