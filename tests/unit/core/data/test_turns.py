"""The text around turns: golden pieces of each template, and templates that can't be taken apart."""

import pytest

from dsft.core.data.examples import Conversation, Turn
from dsft.core.data.prompts import FimPrompt, PromptTemplate, get_template
from dsft.core.data.turns import TurnPieces, find_gap_pieces, find_turn_pieces
from tests.unit.core.data.small_tokenizer import (
    BOS,
    CHAT_ML,
    EOS,
    EOT,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    make_deepseek_like,
)

FOLDED = (
    "{% if messages[0].role == 'system' %}{% set start = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set turns = messages[1:] %}{% else %}{% set start = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if turn.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (start if loop.first else '') + turn.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Of Llama 2's kind: the system text within the first question, and BOS before each."""

HEADED = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}{{ bos_token }}"
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ '### Q:\n' + turn.content + '\n' }}"
    "{% else %}{{ '### A:\n' + turn.content + '\n<|EOT|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### A:' }}{% endif %}"
)
"""Refuses system texts, and leaves the line end before an answer to the model."""

COUNTED = (
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ loop.index ~ '. ' + turn.content + ' => ' }}"
    "{% else %}{{ turn.content + eos_token }}{% endif %}{% endfor %}"
)
"""Numbers its turns."""

FORGETFUL = (
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ '[INST]' + turn.content + '[/INST]' }}"
    "{% else %}{{ turn.content.split(':')[-1] + eos_token }}{% endif %}{% endfor %}"
)
"""Changes answers of some kind."""


def written(template: PromptTemplate, turns: list[Turn]) -> str:
    segments = (
        template.render_prompt(turns) if turns[-1].role == "user" else template.render(Conversation(tuple(turns)))
    )
    return "".join(segment.text for segment in segments)


def test_the_seeds_template():
    assert find_turn_pieces(get_template("instruction", make_deepseek_like())) == TurnPieces(
        bos=BOS,
        opening="",
        before_system="",
        after_system="\n\n",
        before_user="### Instruction:\n",
        after_user="\n\n### Response:\n",
        before_answer="",
        after_answer=EOS,
        between_turns="\n\n",
    )


def test_deepseeks_template_has_words_without_a_system_text():
    template = get_template("deepseek", make_deepseek_like())
    pieces = find_turn_pieces(template)
    assert pieces is not None
    assert pieces.opening.startswith("You are an AI programming assistant")
    assert (pieces.bos, pieces.before_system, pieces.after_system) == (BOS, "", "")
    assert (pieces.before_user, pieces.after_user) == ("\n### Instruction:\n", "\n### Response:\n")
    assert (pieces.before_answer, pieces.after_answer, pieces.between_turns) == ("", f"\n{EOT}", "")


def test_a_chat_template_s_pieces():
    assert find_turn_pieces(get_template("chat", make_deepseek_like(CHAT_ML))) == TurnPieces(
        bos="",
        opening="",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>\n",
        before_user="<|im_start|>user\n",
        after_user="<|im_end|>\n<|im_start|>assistant\n",
        before_answer="",
        after_answer="<|im_end|>",
        between_turns="\n",
    )


def test_a_system_text_within_the_first_question_and_bos_before_each():
    assert find_turn_pieces(get_template("chat", make_deepseek_like(FOLDED))) == TurnPieces(
        bos=BOS,
        opening="[INST] ",
        before_system="[INST] <<SYS>>",
        after_system="<</SYS>>",
        before_user="",
        after_user=" [/INST]",
        before_answer=" ",
        after_answer=f" {EOS}",
        between_turns=f"{BOS}[INST] ",
    )


def test_what_the_model_writes_before_its_answer_and_no_place_for_a_system_text():
    pieces = find_turn_pieces(get_template("chat", make_deepseek_like(HEADED)))
    assert pieces is not None
    assert pieces.before_system is None
    assert (pieces.after_user, pieces.before_answer, pieces.after_answer) == ("\n### A:", "\n", f"\n{EOT}")
    assert (pieces.before_user, pieces.between_turns) == ("### Q:\n", "\n")


@pytest.mark.parametrize(
    ("chat_template", "adds_bos", "bos", "opening"), [(HEADED, True, BOS, ""), (HEADED, False, "", BOS)]
)
def test_only_a_bos_that_the_tokenizer_puts_is_set_apart(chat_template, adds_bos, bos, opening):
    """Of the other kind, no server knows: it stays in the text."""
    pieces = find_turn_pieces(get_template("chat", make_deepseek_like(chat_template, adds_bos=adds_bos)))
    assert pieces is not None
    assert (pieces.bos, pieces.opening) == (bos, opening)


def test_no_bos_where_the_tokenizer_puts_none():
    pieces = find_turn_pieces(get_template("instruction", make_deepseek_like(adds_bos=False)))
    assert pieces is not None
    assert (pieces.bos, pieces.opening) == ("", "")


@pytest.mark.parametrize("name", ["instruction", "deepseek", "chat"])
@pytest.mark.parametrize("system", [None, "", "Say {{ no }} <|EOT|>.\n\n"])
def test_pieces_write_any_conversation_as_the_template_does(name, system):
    template = get_template(name, make_deepseek_like(FOLDED))
    pieces = find_turn_pieces(template)
    assert pieces is not None
    texts = ["  a{b}\r\n", "\n\n'x'\t", "", "### Instruction:\n", f"{EOT}?", "é" * 50, "firstusertextprobe"]
    turns = [] if system is None else [Turn("system", system)]
    for index, text in enumerate(texts):
        turns.append(Turn("assistant", text, True) if index % 2 else Turn("user", text))
        assert pieces.write(turns) == written(template, turns)


@pytest.mark.parametrize("chat_template", [COUNTED, FORGETFUL])
def test_a_chat_template_that_can_t_be_taken_apart(chat_template):
    assert find_turn_pieces(get_template("chat", make_deepseek_like(chat_template))) is None


@pytest.mark.parametrize("name", ["fim", "text"])
def test_templates_without_turns(name):
    assert find_turn_pieces(get_template(name, make_deepseek_like())) is None


def test_the_gap_of_fim():
    template = get_template("fim", make_deepseek_like())
    pieces = find_gap_pieces(template)
    assert pieces is not None
    assert (pieces.bos, pieces.before_prefix, pieces.before_suffix, pieces.before_middle) == (
        BOS,
        FIM_BEGIN,
        FIM_HOLE,
        FIM_END,
    )
    segments = template.render_prompt(FimPrompt("a", "b"))
    assert "".join(segment.text for segment in segments) == f"{BOS}{FIM_BEGIN}a{FIM_HOLE}b{FIM_END}"
    assert find_gap_pieces(get_template("text", make_deepseek_like())) is None
