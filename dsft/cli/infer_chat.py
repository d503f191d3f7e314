"""`dsft infer --chat`: questions from the terminal or stdin, answers to stdout, all else to stderr."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from dsft.cli.errors import Terminated, report
from dsft.cli.infer_answer import AnswerWriter
from dsft.cli.infer_chat_input import Command, open_lines, parse_unit, read_unit
from dsft.cli.output import Output
from dsft.cli.views.drawing import count_nouns
from dsft.cli.views.infer_chat import render_help
from dsft.cli.views.infer_statistics import describe_statistics
from dsft.core.errors import DsftError, ExitCode, InputError
from dsft.core.signals import held_signals
from dsft.infer.config import InferConfig

if TYPE_CHECKING:
    from dsft.infer.chat import Chat
    from dsft.infer.result import InferResult

_COMMANDS = {
    "/help": "show this",
    "/reset": "begin a new conversation; the system text stays",
    "/undo": "drop the last question, with its answer if it got one",
    "/retry": "drop the last answer and ask its question again",
    "/system TEXT": "take another system text; - is none, without TEXT it is shown",
    "/save FILE": "add the conversation to FILE.jsonl for `dsft train`; saved again, its row is written anew",
    "/quit": "leave; Ctrl-D does too",
}
_OTHER_NAMES = {"/exit": "/quit", "/bye": "/quit", "/clear": "/reset"}
"""What other chat programs call them."""

_NAMES = tuple(usage.partition(" ")[0] for usage in _COMMANDS)
_WITH_ARGUMENT = tuple(usage.partition(" ")[0] for usage in _COMMANDS if " " in usage)


def run_chat(config: InferConfig, output: Output) -> None:
    """Answer questions until there are no more.

    Args:
        config: Which model answers, and how.
        output: Where to.

    Raises:
        KeyboardInterrupt: Ctrl-C, twice where someone types.
        typer.Exit: One of the questions on a stdin that is no terminal failed; with its exit code.
    """
    from dsft.infer.chat import Chat

    chat = Chat(config, output.note)
    lines = open_lines(_NAMES, is_bold=output.stderr.color_system is not None)
    if lines.is_interactive:
        output.note(f"Loading {chat.model_name}.")
    chat.load()
    if lines.is_interactive:
        output.note("Ask something. /help lists commands, Ctrl-D leaves.")
    loop = _ChatLoop(chat, output, is_interactive=lines.is_interactive)
    while True:
        try:
            if not loop.take(parse_unit(read_unit(lines.read), _NAMES)):
                break
        except EOFError:
            break
        except InputError as error:  # of a line that is no text
            loop.fail(error)
        except KeyboardInterrupt:
            if not lines.is_interactive:
                raise
            loop.stay(is_sure=not lines.has_typed())
        except Terminated:
            with suppress(OSError):  # the terminal may be gone
                loop.end_line()
            raise
    if loop.exit_code != ExitCode.DONE:
        raise typer.Exit(loop.exit_code)


class _ChatLoop:
    """What a chat does with what it is told.

    Args:
        chat: The conversation.
        output: Where to.
        is_interactive: Whether someone types.

    Attributes:
        exit_code: Of the first failure, where nobody types and could see it.
    """

    def __init__(self, chat: "Chat", output: Output, *, is_interactive: bool) -> None:
        self._chat = chat
        self._output = output
        self._is_interactive = is_interactive
        self._is_warned = False
        self._save_path: Path | None = None
        self.exit_code = ExitCode.DONE

    def take(self, told: Command | str) -> bool:
        """Do what a command says, or answer a question; return whether the chat goes on."""
        self._is_warned = False
        try:
            if isinstance(told, str):
                if told.strip():
                    self._answer(lambda on_text: self._chat.ask(told, on_text))
                return True
            return self._obey(told)
        except DsftError as error:
            self.fail(error)
            return True

    def fail(self, error: DsftError) -> None:
        """Tell of something that did not work; the chat goes on."""
        told = report(error)
        self._output.fail(told)
        if not self._is_interactive and self.exit_code == ExitCode.DONE:
            self.exit_code = told.exit_code

    def stay(self, *, is_sure: bool) -> None:
        """Take a Ctrl-C at the prompt: say how to leave, and leave at the second one.

        Args:
            is_sure: Whether nothing was typed that the interrupt may have been meant to clear.
        """
        self.end_line()
        if self._is_warned and is_sure:
            raise KeyboardInterrupt
        self._is_warned = True
        self._tell("Ctrl-D or /quit leaves; so does Ctrl-C once more.")

    def end_line(self) -> None:
        """End the line on which someone was typing."""
        if self._is_interactive:
            self._tell("")

    def _answer(self, ask: "Callable[[Callable[[str], None]], InferResult]") -> None:
        writer = AnswerWriter(self._output)
        try:
            result = ask(writer.write)
        except KeyboardInterrupt:
            with held_signals():  # someone in a hurry presses it twice
                writer.break_off()
                if self._chat.has_open_question:
                    self.end_line()  # of the ^C
            if not self._is_interactive:
                raise
            self._output.note(
                "Stopped before the answer began; the question is not kept."
                if self._chat.has_open_question
                else "Stopped; the answer is kept as far as it came. /retry asks anew, /undo drops it."
            )
            return
        except (DsftError, Terminated):
            writer.break_off()
            raise
        writer.end()
        self._output.note(describe_statistics(result, with_process=False), "dim")
        if self._chat.has_open_question:
            self._output.note("The answer says nothing; the question is not kept.")

    def _obey(self, command: Command) -> bool:
        name = _OTHER_NAMES.get(command.name, command.name)
        if name not in _NAMES:
            raise InputError(
                f"There is no command {name}.", "/help lists them; a question is written with two slashes."
            )
        if command.argument and name not in _WITH_ARGUMENT:
            raise InputError(f"{command.name} takes nothing, but {command.argument!r} follows.", "/help lists them.")
        if name == "/quit":
            return False
        actions: dict[str, Callable[[], None]] = {
            "/help": lambda: self._output.stderr.print(render_help(_COMMANDS)),
            "/reset": self._reset,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": lambda: self._change_system(command.argument),
            "/save": lambda: self._save(command.argument),
        }
        actions[name]()
        return True

    def _reset(self) -> None:
        self._chat.reset()
        self._output.note("A new conversation.")

    def _undo(self) -> None:
        what = "the question that got no answer" if self._chat.has_open_question else "the last question and its answer"
        self._chat.undo()
        self._output.note(f"Dropped {what}; {count_nouns(len(self._chat.exchanges), 'question')} left.")

    def _retry(self) -> None:
        exchanges = self._chat.exchanges
        if self._chat.is_repeatable and exchanges and not exchanges[-1].is_cut and not self._chat.has_open_question:
            self._output.note("The answer will be the same: --temperature without --seed makes another one.")
        self._answer(self._chat.retry)

    def _change_system(self, text: str) -> None:
        if not text:
            self._tell(self._chat.system or "There is no system text.")
            return
        self._chat.change_system(None if text == "-" else text)
        self._output.note("No system text from here on." if text == "-" else "A new system text from here on.")

    def _save(self, name: str) -> None:
        path = Path(name) if name else self._save_path
        if path is None:
            raise InputError("/save needs the name of a file.", "Write /save chats.jsonl.")
        saved = self._chat.save(path)
        self._save_path = path
        what = count_nouns(saved.num_exchanges, "question")
        how = "the row saved before is written anew" if saved.has_replaced else "one row more"
        self._output.note(f"Saved {what} with answers in {path}: {how}. `dsft train --dataset {path}` reads it.")
        if saved.num_cut:
            cut = "1 answer was" if saved.num_cut == 1 else f"{saved.num_cut} answers were"
            self._output.warn(f"{cut} stopped before the end; a model trained on that learns to stop there.")

    def _tell(self, text: str) -> None:
        """Say on stderr what was asked for, quietly too."""
        self._output.stderr.print(Text(text), soft_wrap=True)
