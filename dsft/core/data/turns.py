"""The literal text around the turns of a conversation, found by writing probes with a template and taking them apart.

Servers need it: they write prompts themselves, in their own template languages, and must write what training wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsft.core.data.examples import Conversation, Turn, UnusableRowError
from dsft.core.data.prompts import FimPrompt, FimTemplate, Prompt, PromptTemplate
from dsft.core.data.segments import Segment
from dsft.core.errors import DataError

SYSTEM, USER, ANSWER, NEXT_USER = "systemtextprobe", "firstusertextprobe", "answertextprobe", "nextusertextprobe"
"""Texts of the probes: words that no template has or changes."""

_QUESTIONS = ("Sort {x}.", 'What\'s "{{ this }}"?\n\n\tCode:\n```\n{% if a %}\n```', "größer als 3 – 世界 🙂")
_ANSWERS = ("sorted(x)", "{'a': \"b\\n\"}\n    indented", "### Instruction:\nétude")
_SYSTEM_TEXT = 'Be "brief" {now}.\nUse Python.'


@dataclass(frozen=True)
class TurnPieces:
    """What a template writes around the texts of a conversation.

    Texts themselves are written as they are; a chat template that takes blanks off their ends does so on its own.

    Attributes:
        bos: Spelling of what the tokenizer itself puts before a text, where the template begins with it; no other piece
            holds it. A server that adds it by itself must do so if and only if this is not empty.
        opening: Before the first turn of a conversation without a system text.
        before_system: Before a system text; None where the template has no place for one.
        after_system: Between a system text and the first turn.
        before_user: Before the text of a user turn.
        after_user: Behind it, up to where the answer is generated.
        before_answer: Between that and an answer's text in a finished conversation; a model generates it.
        after_answer: Behind an answer, the end token included.
        between_turns: Between an answer and the next user turn.
    """

    bos: str
    opening: str
    before_system: str | None
    after_system: str
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    between_turns: str

    def write(self, turns: Sequence[Turn]) -> str:
        """Return a conversation as the template writes it; one that ends with a user turn as a prompt."""
        parts = [self.bos]
        if turns[0].role == "system":
            parts += [self.before_system or "", turns[0].text, self.after_system]
        else:
            parts.append(self.opening)
        spoken = [turn for turn in turns if turn.role != "system"]
        for index, turn in enumerate(spoken):
            if turn.role == "user":
                parts += [self.between_turns if index else "", self.before_user, turn.text, self.after_user]
            else:
                parts += [self.before_answer, turn.text, self.after_answer]
        return "".join(parts)


@dataclass(frozen=True)
class GapPieces:
    """What the template fim writes around the texts before and after a gap.

    Attributes:
        bos: As in `TurnPieces`.
        before_prefix: Before the text that the gap follows.
        before_suffix: Between that text and the one that follows the gap.
        before_middle: Behind both, where the answer is generated.
    """

    bos: str
    before_prefix: str
    before_suffix: str
    before_middle: str


def find_turn_pieces(template: PromptTemplate) -> TurnPieces | None:
    """Take a template of conversations apart.

    Returns:
        Its pieces; None for a template that writes no conversations, or not by putting the same pieces around each
        turn. Longer conversations have been written both ways and were the same.
    """
    try:
        pieces = _take_apart(template)
        is_same = pieces is not None and all(
            pieces.write(turns) == _write(template, turns) for turns in _conversations(pieces.before_system is not None)
        )
    except (DataError, UnusableRowError):
        return None
    return pieces if is_same else None


def find_gap_pieces(template: PromptTemplate) -> GapPieces | None:
    """Return what the template fim writes around prefix and suffix; None for another template."""
    if not isinstance(template, FimTemplate):
        return None
    before_prefix, rest = _join(template.render_prompt(FimPrompt(USER, NEXT_USER))).split(USER)
    before_suffix, before_middle = rest.split(NEXT_USER)
    bos = _join(template.encoder.bos_segments)
    return GapPieces(bos, before_prefix.removeprefix(bos), before_suffix, before_middle)


def _take_apart(template: PromptTemplate) -> TurnPieces | None:
    user, answer, next_user = Turn("user", USER), Turn("assistant", ANSWER, True), Turn("user", NEXT_USER)
    prompt = _write(template, [user])
    finished = _write(template, [user, answer])
    two_turns = _write(template, [user, answer, next_user])
    before_first, found, after_user = prompt.partition(USER)
    before_answer, answered, after_answer = finished.removeprefix(prompt).partition(ANSWER)
    before_next = two_turns.removeprefix(finished).partition(NEXT_USER)[0]
    if not (found and answered and finished.startswith(prompt) and two_turns.startswith(finished)):
        return None
    before_system, after_system = _find_system_place(template)
    bos = _join(template.encoder.bos_segments)
    if not all(text.startswith(bos) for text in (before_first, before_system) if text is not None):
        bos = ""
    before_first = before_first.removeprefix(bos)
    # What stands before every user text alike belongs to the turn; the rest of each is what sets them apart.
    firsts = [before_first, before_next, *([] if before_system is None else [after_system])]
    before_user = _find_common_end(firsts)
    return TurnPieces(
        bos=bos,
        opening=before_first.removesuffix(before_user),
        before_system=None if before_system is None else before_system.removeprefix(bos),
        after_system=after_system.removesuffix(before_user),
        before_user=before_user,
        after_user=after_user,
        before_answer=before_answer,
        after_answer=after_answer,
        between_turns=before_next.removesuffix(before_user),
    )


def _find_system_place(template: PromptTemplate) -> tuple[str | None, str]:
    """Return the text before a system text and that between it and the first user text; None where it has no place."""
    try:
        text = _write(template, [Turn("system", SYSTEM), Turn("user", USER)])
    except (DataError, UnusableRowError):
        return None, ""
    before_system, found, rest = text.partition(SYSTEM)
    return (before_system, rest.partition(USER)[0]) if found else (None, "")


def _find_common_end(texts: Sequence[str]) -> str:
    length = 0
    for characters in zip(*map(reversed, texts), strict=False):
        if len(set(characters)) > 1:
            break
        length += 1
    return texts[0][len(texts[0]) - length :]


def _conversations(has_system: bool) -> list[list[Turn]]:
    turns = [
        turn
        for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
        for turn in (Turn("user", question), Turn("assistant", answer, True))
    ]
    without = [turns[:length] for length in range(1, len(turns) + 1)]
    return without + [[Turn("system", _SYSTEM_TEXT), *some] for some in without if has_system]


def _write(template: PromptTemplate, turns: list[Turn]) -> str:
    if turns[-1].role == "assistant":
        return _join(template.render(Conversation(tuple(turns))))
    prompt: Prompt = turns
    return _join(template.render_prompt(prompt))


def _join(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)
