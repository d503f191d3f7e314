"""What each template writes: the exact text, the exact ids, and that training and inference can't differ."""

import pytest

from dsft.core.data.examples import Conversation, FimTriple, RawText, Turn
from dsft.core.data.prompts import DeepSeekTemplate, FimPrompt, InstructionTemplate, choose_template_name, get_template
from dsft.core.data.segments import Segment
from dsft.core.errors import DataError
from tests.unit.core.data.conversations import converse
from tests.unit.core.data.small_tokenizer import (
    BOS,
    CHAT_ML,
    EOS,
    EOT,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    make_deepseek_like,
    make_prefixing,
)

SYSTEM_TEXT = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer."
)
DIALOGUE = converse("Sort.", "sorted(x)", "Reverse.", "x[::-1]")


def written(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def learned(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments if segment.is_target)


def encode(template, example) -> list[int]:
    return template.encoder.encode_prompt(template.render(example))


# instruction


def test_the_default_template_is_that_of_the_seed(small):
    segments = get_template("instruction", small).render(converse("Sort.", "sorted(x)"))
    assert written(segments) == f"{BOS}### Instruction:\nSort.\n\n### Response:\nsorted(x){EOS}"
    assert learned(segments) == f"sorted(x){EOS}"


def test_a_prompt_has_the_ids_that_the_tokenizer_gives_its_text(deepseek):
    """The seed's own way to ask: a text, tokenized by calling the tokenizer."""
    text = "### Instruction:\nWrite a CUDA kernel for matrix multiplication\n\n### Response:\n"
    ids = get_template("instruction", deepseek).encode_prompt("Write a CUDA kernel for matrix multiplication")
    assert ids == deepseek(text)["input_ids"]
    assert ids[0] == 32013 and ids.count(32013) == 1


def test_no_bos_where_the_tokenizer_adds_none():
    template = get_template("instruction", make_deepseek_like(adds_bos=False))
    assert template.bos == []
    assert written(template.render(converse("a", "b"))).startswith("### Instruction:")


def test_bos_is_known_by_its_id(deepseek):
    assert get_template("instruction", deepseek).bos == [32013]


def test_a_second_question_stands_behind_the_first_answer_and_both_answers_are_learned(small):
    segments = get_template("instruction", small).render(DIALOGUE)
    assert written(segments) == (
        f"{BOS}### Instruction:\nSort.\n\n### Response:\nsorted(x){EOS}"
        f"\n\n### Instruction:\nReverse.\n\n### Response:\nx[::-1]{EOS}"
    )
    assert learned(segments) == f"sorted(x){EOS}x[::-1]{EOS}"


def test_an_answer_that_is_given_is_not_learned_and_neither_is_its_end(small):
    turns = (Turn("user", "a"), Turn("assistant", "given"), Turn("user", "b"), Turn("assistant", "new", True))
    for name in ("instruction", "deepseek"):
        template = get_template(name, small)
        assert learned(template.render(Conversation(turns))).replace("\n", "") == f"new{template.end_token}"


def test_a_system_text_stands_first(small):
    segments = get_template("instruction", small).render(converse("a", "b", system="Be brief."))
    assert written(segments) == f"{BOS}Be brief.\n\n### Instruction:\na\n\n### Response:\nb{EOS}"


# deepseek


def test_the_deepseek_template_is_that_of_the_instruct_models(small):
    segments = get_template("deepseek", small).render(DIALOGUE)
    assert written(segments) == (
        f"{BOS}{SYSTEM_TEXT}\n### Instruction:\nSort.\n### Response:\nsorted(x)\n{EOT}"
        f"\n### Instruction:\nReverse.\n### Response:\nx[::-1]\n{EOT}"
    )
    assert learned(segments) == f"sorted(x)\n{EOT}x[::-1]\n{EOT}"


def test_the_deepseek_template_ends_answers_with_the_known_id(deepseek):
    template = get_template("deepseek", deepseek)
    ids = encode(template, converse("Sort.", "sorted(x)"))
    assert (ids[0], ids[-1]) == (32013, 32021) and ids.count(32021) == 1
    assert template.stop_token_ids == [32021]
    assert get_template("instruction", deepseek).stop_token_ids == [32014]


def test_a_system_text_of_the_data_replaces_deepseek_s(small):
    segments = get_template("deepseek", small).render(converse("a", "b", system="Be brief."))
    assert written(segments) == f"{BOS}Be brief.\n### Instruction:\na\n### Response:\nb\n{EOT}"


def test_the_deepseek_template_needs_its_end_token():
    with pytest.raises(DataError, match=r"<\|EOT\|>.*--template instruction"):
        get_template("deepseek", make_prefixing())


# fim


def test_fim_is_written_in_the_order_of_deepseek_s_training(deepseek):
    def plain(text):
        return deepseek(text, add_special_tokens=False)["input_ids"]

    prefix, middle, suffix = "def f(x):\n", "    y = x\n", "    return y\n"
    template = get_template("fim", deepseek)
    prompt = [32013, 32016, *plain(prefix), 32015, *plain(suffix), 32017]
    assert template.encode_prompt(FimPrompt(prefix, suffix)) == prompt
    assert encode(template, FimTriple(prefix, suffix, middle)) == [*prompt, *plain(middle), 32014]
    assert template.stop_token_ids == [32014]


def test_only_the_middle_and_its_end_are_learned(small):
    segments = get_template("fim", small).render(FimTriple("a", "c", "b"))
    assert written(segments) == f"{BOS}{FIM_BEGIN}a{FIM_HOLE}c{FIM_END}b{EOS}"
    assert learned(segments) == f"b{EOS}"


def test_a_mere_text_is_a_prefix_with_nothing_behind_the_gap(small):
    template = get_template("fim", small)
    assert template.encode_prompt("def f") == template.encode_prompt(FimPrompt("def f", ""))


def test_fim_needs_fim_tokens():
    with pytest.raises(DataError, match="fill-in-the-middle tokens"):
        get_template("fim", make_prefixing())


# text


def test_a_text_is_learned_whole(small):
    segments = get_template("text", small).render(RawText("x = 1\n", parse_special=True))
    assert written(segments) == f"{BOS}x = 1\n{EOS}"
    assert learned(segments) == f"x = 1\n{EOS}"


def test_control_tokens_in_a_text_are_meant_unless_it_quotes_them(small):
    template = get_template("text", small)
    eot = template.encoder.token_id(EOT)
    assert eot in encode(template, RawText(f"a{EOT}b", parse_special=True))
    assert eot not in encode(template, RawText(f"a{EOT}b", parse_special=False))


def test_a_text_that_was_written_with_bos_and_end_token_gets_no_second_ones(small):
    """As a data set has it whose conversations were already written down by a chat template."""
    template = get_template("text", small)
    bare, whole = RawText("### a", parse_special=True), RawText(f"{BOS}### a{EOS}", parse_special=True)
    assert encode(template, whole) == encode(template, bare)
    assert template.encode_prompt(f"{BOS}### a") == template.encode_prompt("### a")
    quoting = encode(template, RawText(f"{BOS}a{EOS}", parse_special=False))
    assert quoting[0] == template.bos[0] and quoting[-1] == template.stop_token_ids[0]
    assert template.encoder.decode(quoting) == f"{BOS}{BOS}a{EOS}{EOS}", "text that looks like them stays text"


# Training and inference


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["instruction", "deepseek", "chat"])
def test_an_answer_is_trained_behind_the_very_ids_it_is_asked_with(small_chat, name, system):
    template = get_template(name, small_chat)
    ids = encode(template, converse("Sort.", "  sorted(x)\n", "Reverse.", "\nx", system=system))
    for prompt in ("Sort.", converse("Sort.", "  sorted(x)\n", "Reverse.").turns):
        asked = template.encode_prompt(prompt, system)
        assert ids[: len(asked)] == asked


def test_the_real_tokenizer_gives_training_the_ids_of_inference(deepseek):
    """A blank, a line end or a letter at the joint would be tokenized into one with its neighbour, were it not for
    the joint."""
    for name in ("instruction", "deepseek"):
        template = get_template(name, deepseek)
        for answer in (" x", "\n\nx", "\tx", "x", "Ünï", "\r\n"):
            asked = template.encode_prompt("Sort.")
            assert encode(template, converse("Sort.", answer))[: len(asked)] == asked
    template = get_template("fim", deepseek)
    for middle in (" x", "\n\nx", "x"):
        asked = template.encode_prompt(FimPrompt("a ", " b"))
        assert encode(template, FimTriple("a ", " b", middle))[: len(asked)] == asked


@pytest.mark.parametrize("name", ["instruction", "deepseek", "chat", "fim"])
@pytest.mark.parametrize("token", [BOS, EOS, EOT, FIM_HOLE, "<pad>", "<|im_end|>"])
def test_control_tokens_quoted_in_data_stay_text(small_chat, name, token):
    template = get_template(name, small_chat)
    if name == "fim":
        quoting, plain = FimTriple(f"a{token}", f"{token}c", f"b{token}b"), FimTriple("a", "c", "bb")
    else:
        quoting, plain = converse(f"What is {token}?", f"{token} is", "And?", "b"), converse("What?", "is", "And?", "b")
    control_ids = set(template.encoder.control_tokens.values())

    def count(ids: list[int]) -> int:
        return sum(token_id in control_ids for token_id in ids)

    ids = encode(template, quoting)
    assert count(ids) == count(encode(template, plain)), "only those of the template"
    assert template.encoder.decode(ids).count(token) >= 2, "as text it is still there"


# What a template can't write


@pytest.mark.parametrize("name", ["instruction", "deepseek", "chat"])
@pytest.mark.parametrize("example", [RawText("a", True), FimTriple("a", "b", "c")])
def test_turns_are_demanded_where_the_template_has_turns(small_chat, name, example):
    template = get_template(name, small_chat)
    with pytest.raises(DataError, match=f"template {name} has no place"):
        template.render(example)
    with pytest.raises(DataError, match=f"template {name} has no place for a gap"):
        template.render_prompt(FimPrompt("a", "b"))


@pytest.mark.parametrize(("name", "other"), [("fim", RawText("a", True)), ("text", FimTriple("a", "b", "c"))])
def test_conversations_are_refused_where_there_are_no_turns(small, name, other):
    template = get_template(name, small)
    for example in (converse("a", "b"), other):
        with pytest.raises(DataError, match=f"template {name} has no place"):
            template.render(example)
    for prompt, system in ((converse("a", "b", "c").turns, None), ("a", "Be brief.")):
        with pytest.raises(DataError, match=f"template {name} has no place"):
            template.render_prompt(prompt, system)


@pytest.mark.parametrize("turns", [[], [Turn("user", "a"), Turn("assistant", "b")]])
def test_there_must_be_something_to_answer(small, turns):
    with pytest.raises(DataError, match="does not end with a user turn"):
        get_template("instruction", small).encode_prompt(turns)


def test_an_unknown_template_is_refused_with_the_names_of_the_others(small):
    with pytest.raises(DataError, match=r"alpaca.*instruction, deepseek, chat, fim, text"):
        get_template("alpaca", small)


# auto


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("instruction", "instruction"),
        ("prompt/completion", "instruction"),
        ("messages", "chat"),
        ("conversations", "chat"),
        ("text", "text"),
        ("fim", "fim"),
        ("source files", "fim"),
    ],
)
def test_the_layout_chooses_the_template(small_chat, layout, name):
    assert choose_template_name(layout, small_chat) == name


def test_a_tokenizer_without_chat_template_or_fim_tokens_gets_what_it_can_do():
    tokenizer = make_prefixing()
    assert choose_template_name("messages", tokenizer) == "instruction"
    assert choose_template_name("source files", tokenizer) == "text"


@pytest.mark.parametrize("is_special", [True, False])
def test_gap_tokens_are_those_that_the_template_would_take(is_special):
    tokenizer = make_prefixing()
    tokenizer.add_tokens(["<fim-prefix>", "<fim-suffix>", "<fim-middle>"], special_tokens=is_special)
    name = choose_template_name("source files", tokenizer)
    assert name == ("fim" if is_special else "text")
    assert get_template(name, tokenizer).name == name


# The key


def test_keys_tell_templates_apart(small_chat):
    names = ("instruction", "deepseek", "chat", "fim", "text")
    keys = [get_template(name, small_chat).key for name in names]
    assert len(set(keys)) == len(names)
    assert keys == [get_template(name, make_deepseek_like(CHAT_ML)).key for name in names]


def test_a_key_changes_with_what_is_written(small, small_chat, monkeypatch):
    chat = get_template("chat", make_deepseek_like(CHAT_ML.replace("<|im_end|>\n", "<|im_end|>"))).key
    assert chat != get_template("chat", small_chat).key
    before = [get_template("instruction", small).key, get_template("deepseek", small).key]
    monkeypatch.setattr(InstructionTemplate, "between_blocks", "\n")
    monkeypatch.setattr(DeepSeekTemplate, "system_text", "You are brief.")
    after = [get_template("instruction", small).key, get_template("deepseek", small).key]
    assert before[0] != after[0] and before[1] != after[1]
