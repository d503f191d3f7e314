"""The chat template of a merged model, from a prompt template of dsft's own: other programs then write it too."""

import json
from typing import TYPE_CHECKING

from dsft.core.data.examples import Turn
from dsft.core.data.prompts import PromptTemplate
from dsft.core.data.turns import TurnPieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = (
    Turn("system", "Be brief.\n"),
    Turn("user", ' "Sort" {{ x }}:\n    def f():\n'),
    Turn("assistant", "    return [x]", True),
    Turn("user", "  and now? "),
    Turn("assistant", "\n\nworld", True),
    Turn("user", "Reverse it.\n\n"),
)
"""Blanks and line ends at both ends of texts, where tokenizers join what stands side by side."""


def write_jinja(pieces: TurnPieces) -> str:
    """Return a chat template that writes conversations as a prompt template does.

    What stands before an answer is written behind each user turn, asked for by `add_generation_prompt` or not: in
    training it was never missing. The beginning-of-text token is written out, because transformers adds none to what a
    chat template writes.

    A control token that a user spells is text in training. No chat template can keep that: all of what it writes is
    tokenized at once, so there the spelling becomes the token.
    """
    opening = "{{- " + _quote(pieces.bos + pieces.opening) + " -}}"
    if pieces.before_system is None:
        system = "{{- raise_exception('This model was trained without a system text.') -}}"
    else:
        before = _quote(pieces.bos + pieces.before_system)
        system = "{{- " + before + " + messages[0]['content'] + " + _quote(pieces.after_system) + " -}}"
    between, before_user = _quote(pieces.between_turns), _quote(pieces.before_user)
    before_answer, after_answer = _quote(pieces.before_answer), _quote(pieces.after_answer)
    lines = [
        "{%- if messages[0]['role'] == 'system' -%}",
        system,
        "{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        opening,
        "{%- set turns = messages -%}",
        "{%- endif -%}",
        "{%- for turn in turns -%}",
        "{%- if turn['role'] == 'user' -%}",
        "{%- if not loop.first -%}",
        "{{- " + between + " -}}",
        "{%- endif -%}",
        "{{- " + before_user + " + turn['content'] + " + _quote(pieces.after_user) + " -}}",
        "{%- elif turn['role'] == 'assistant' -%}",
        "{{- " + before_answer + " + turn['content'] + " + after_answer + " -}}",
        "{%- else -%}",
        "{{- raise_exception('This model was trained on system, user and assistant turns alone.') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines) + "\n"


def gives_training_ids(chat_template: str, template: PromptTemplate, tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether a chat template gives the token ids of training, tried on conversations with awkward texts.

    The text is the same, but training tokenizes an answer apart from its prompt, and here all is tokenized at once:
    tokenizers that join an answer's first blanks with a line end before it, or put a blank before each text, differ.
    """
    for turns in (_PROBE[1:2], _PROBE[:2], _PROBE[1:4], _PROBE):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        ids = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, add_generation_prompt=True, return_dict=False
        )
        if ids != template.encode_prompt(turns):
            return False
    return True


def _quote(text: str) -> str:
    """Return a text as a Jinja string; it knows JSON's escapes, and characters beyond ASCII stand for themselves."""
    return json.dumps(text, ensure_ascii=False)
