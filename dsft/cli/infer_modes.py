"""Which way of asking the options of `dsft infer` choose, what contradicts, and what is asked; loads no model."""

import fcntl
import struct
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsft.core.config.schema import TemplateChoice
from dsft.core.errors import ConfigError, InputError
from dsft.core.notices import Notify
from dsft.infer.marked_file import MAX_BYTES


@dataclass(frozen=True)
class ModeOptions:
    """The options that say what is asked, and those that only go with some of them.

    Raises:
        ConfigError: They contradict, and all that does is told at once; or one is out of range.
    """

    prompt: str | None = None
    is_chat: bool = False
    is_comparing: bool = False
    prompts_file: Path | None = None
    answers_file: Path | None = None
    batch_size: int | None = None
    fim_file: Path | None = None
    is_in_place: bool = False
    fim_prefix: str | None = None
    fim_suffix: str | None = None
    template: TemplateChoice = "auto"
    is_raw: bool = False
    system: str | None = None
    is_code: bool = False
    is_speculating: bool = False
    use_json: bool = False

    def __post_init__(self) -> None:
        problems = [*self._find_clashes(), *self._find_missing(), *self._find_misfits()]
        if problems:
            raise ConfigError(" ".join(problems), "Leave out what does not go together; `dsft infer --help` lists it.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(
                f"--batch-size is {self.batch_size}, but must be at least 1.",
                "`dsft infer --help` lists what each option takes.",
            )

    @property
    def is_filling(self) -> bool:
        """Whether a gap is to be filled."""
        return bool(self._fim_flags)

    @property
    def _fim_flags(self) -> list[str]:
        values = {"--fim": self.fim_file, "--fim-prefix": self.fim_prefix, "--fim-suffix": self.fim_suffix}
        return [flag for flag, value in values.items() if value is not None]

    @property
    def _mode_flags(self) -> list[str]:
        flags = {"--chat": self.is_chat, "--compare": self.is_comparing, "--file": self.prompts_file is not None}
        return [*(flag for flag, is_given in flags.items() if is_given), *self._fim_flags[:1]]

    def _find_clashes(self) -> Iterator[str]:
        modes = self._mode_flags
        if len(modes) > 1:
            yield f"{', '.join(modes[:-1])} and {modes[-1]} are different ways to ask."
        if self.fim_file is not None and len(self._fim_flags) > 1:
            yield f"--fim takes the text around the gap from its file, but {self._fim_flags[1]} gives it too."
        asked_elsewhere = [flag for flag in modes if flag != "--compare"]
        if self.prompt is not None and asked_elsewhere:
            yield f"A prompt was given, but {asked_elsewhere[0]} takes none."

    def _find_missing(self) -> Iterator[str]:
        if self.is_in_place and self.fim_file is None:
            yield "--in-place writes into the file of --fim, and there is none."
        for flag, value in (("--output", self.answers_file), ("--batch-size", self.batch_size)):
            if value is not None and self.prompts_file is None:
                yield f"{flag} belongs to --file, and there is none."

    def _find_misfits(self) -> Iterator[str]:
        modes = self._mode_flags
        if self.is_code and modes:
            yield f"--code prints the code of a single answer, so it does not go with {modes[0]}."
        if self.is_chat and self.use_json:
            yield "--json is for programs, but --chat for people."
        if self.is_speculating and self.prompts_file is not None:
            yield "--speculate speeds up one answer at a time, but --file asks for several at once."
        if not self.is_filling:
            return
        fim_flag = self._fim_flags[0]
        if self.system is not None:
            yield f"{fim_flag} has no place for the text of --system."
        if self.is_raw:
            yield f"{fim_flag} writes a prompt of its own, but --raw asks for none."
        if self.template not in {"auto", "fim"}:
            yield f"{fim_flag} needs the template fim, but --template {self.template} was given."


def read_text_value(value: str | None, flag: str) -> str | None:
    """Return the text that an option's value stands for: itself, or the content of a file (`@FILE`).

    Args:
        value: As written; `@@` at its start stands for an `@` that belongs to the text.
        flag: The option, for errors.

    Raises:
        InputError: The file can't be read, is too large or is not UTF-8.
    """
    if value is None or not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        # Bytes, because line ends are to stay as they are.
        with Path(value[1:]).expanduser().open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(
                f"The file of {flag}, {value[1:]}, is larger than {MAX_BYTES // 1024**2} MiB.",
                "Give the part near the gap alone.",
            )
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The file of {flag}, {value[1:]}, is not valid UTF-8 at byte {error.start + 1}.",
            "Convert it to UTF-8.",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The file of {flag} can't be read: {value[1:]!r}: {reason}.",
            "Check the path; a text that begins with @ is written with two of them.",
        ) from None


def read_prompt(argument: str | None, is_raw: bool, on_notice: Notify) -> str:
    """Return the prompt: the argument, or what stands on stdin.

    Args:
        argument: As written; None and `-` are stdin.
        is_raw: Whether the text is continued to the letter.
        on_notice: Is told where something stands on stdin that is not read.

    Raises:
        InputError: There is none, or it is not UTF-8.
    """
    if argument not in (None, "-"):
        # Never read: in a shell's `while read` loop stdin is the loop's list, and an open pipe would be waited for.
        if _has_waiting_text():
            on_notice(
                "stdin was not read, because the prompt was given as the argument. To ask with both: "
                'dsft infer "PROMPT $(cat FILE)"'
            )
        return str(argument)
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise InputError(
            "There is no prompt.", 'Write it as the argument, `dsft infer "prompt"`, or pipe it into stdin.'
        )
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The prompt on stdin is not valid UTF-8 at byte {error.start + 1}.", "Give it in the UTF-8 encoding."
        ) from None
    # The line end that echo and editors add is no part of a question; a text to be continued is taken to the letter.
    return text if is_raw else text.removesuffix("\n").removesuffix("\r")


def _has_waiting_text() -> bool:
    """Return whether a file or pipe on stdin has something to be read at this moment; reads nothing of it."""
    if sys.stdin is None or sys.stdin.isatty():
        return False
    try:
        # Of files what is left, of pipes and sockets what has come. A poll would say yes at the end of a file too.
        answer = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, struct.pack("i", 0))
    except (OSError, ValueError):  # a device as /dev/null, or no real file
        return False
    num_bytes: int = struct.unpack("i", answer)[0]
    return num_bytes != 0  # negative where a file has more than an int tells
