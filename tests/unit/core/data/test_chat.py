"""The tokenizer's own chat template: its text and ids, masks by position, and templates that can't be trained with."""

import pytest
from tokenizers import AddedToken

from dsft.core.data.examples import Conversation, Turn, UnusableRowError
from dsft.core.data.prompts import get_template
from dsft.core.data.segments import Segment
from dsft.core.errors import DataError
from tests.unit.core.data.conversations import converse
from tests.unit.core.data.small_tokenizer import CHAT_ML, EOS, EOT, make_deepseek_like

BLOCKS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '### Instruction:\n' + message.content + '\n' }}{% elif message.role == 'system' %}"
    "{{ message.content + '\n' }}{% else %}{{ '### Response:\n' + message.content + '\n<|EOT|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
)
"""Writes what DeepSeek-Coder's instruct models read, their BOS included."""

BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Of Llama 2's kind: answers trimmed, between blanks, and no words for a prompt of its own."""

DIALOGUE = converse("Sort.", "sorted(x)", "Reverse.", "x[::-1]")


def as_messages(turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def written(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def learned(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments if segment.is_target)


def encode(template, example) -> list[int]:
    return template.encoder.encode_prompt(template.render(example))


@pytest.mark.parametrize("chat_template", [CHAT_ML, BLOCKS, BRACKETS])
def test_prompts_are_what_the_tokenizer_s_chat_template_makes_of_them(chat_template):
    tokenizer = make_deepseek_like(chat_template)
    turns = DIALOGUE.turns[:3]
    expected = tokenizer.apply_chat_template(as_messages(turns), add_generation_prompt=True, return_dict=False)
    assert get_template("chat", tokenizer).encode_prompt(turns) == expected


@pytest.mark.parametrize("chat_template", [CHAT_ML, BLOCKS, BRACKETS])
def test_a_sample_is_the_rendered_conversation_up_to_its_last_end_token(chat_template):
    tokenizer = make_deepseek_like(chat_template)
    text = tokenizer.apply_chat_template(as_messages(DIALOGUE.turns), tokenize=False)
    assert written(get_template("chat", tokenizer).render(DIALOGUE)) == text.removesuffix("\n")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_written_once_by_the_chat_template(adds_bos):
    tokenizer = make_deepseek_like(BLOCKS, adds_bos=adds_bos)
    template = get_template("chat", tokenizer)
    assert template.bos == [], "the template's own"
    for ids in (template.encode_prompt("Sort."), encode(template, DIALOGUE)):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in encode(get_template("chat", make_deepseek_like(CHAT_ML)), DIALOGUE)


def test_the_instruct_model_s_chat_template_gives_the_ids_of_the_template_deepseek(deepseek, monkeypatch):
    monkeypatch.setattr(deepseek, "chat_template", BLOCKS)
    chat, own = get_template("chat", deepseek), get_template("deepseek", deepseek)
    example = converse("Sort.", "sorted(x)", "Reverse.", "x[::-1]", system="Be brief.")
    assert encode(chat, example) == encode(own, example)
    assert chat.stop_token_ids == own.stop_token_ids == [32021]


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (CHAT_ML, "sorted(x)<|im_end|>x[::-1]<|im_end|>"),
        (BLOCKS, f"\nsorted(x)\n{EOT}\nx[::-1]\n{EOT}"),
        (BRACKETS, f" sorted(x) {EOS} x[::-1] {EOS}"),
    ],
)
def test_answers_are_learned_up_to_the_control_token_behind_them(chat_template, expected):
    assert learned(get_template("chat", make_deepseek_like(chat_template)).render(DIALOGUE)) == expected


@pytest.mark.parametrize(("chat_template", "end"), [(CHAT_ML, "<|im_end|>"), (BLOCKS, EOT), (BRACKETS, EOS)])
def test_the_stop_token_is_the_one_behind_an_answer(chat_template, end):
    tokenizer = make_deepseek_like(chat_template)
    assert get_template("chat", tokenizer).stop_token_ids == [tokenizer.convert_tokens_to_ids(end)]


def test_an_answer_that_is_given_is_not_learned(small_chat):
    turns = (Turn("user", "a"), Turn("assistant", "given"), Turn("user", "b"), Turn("assistant", "new", True))
    assert learned(get_template("chat", small_chat).render(Conversation(turns))) == "new<|im_end|>"


@pytest.mark.parametrize("answer", ["a", "assistant", "\n", "user\na", "  x  ", " ", "<"])
@pytest.mark.parametrize("chat_template", [CHAT_ML, BLOCKS])
def test_answers_that_also_stand_elsewhere_are_found_in_their_place(chat_template, answer):
    example = converse("a", answer, "user", answer)
    segments = get_template("chat", make_deepseek_like(chat_template)).render(example)
    after, lead = ("<|im_end|>", "") if chat_template == CHAT_ML else (f"\n{EOT}", "\n")
    assert learned(segments) == (lead + answer + after) * 2


def test_what_stands_between_prompt_and_answer_is_not_taken_for_the_answer():
    """As in gpt-oss, whose prompt ends before the name of the channel."""
    channels = CHAT_ML.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}final<|im_start|>{% endif %}{{ message.content }}",
    )
    template = get_template("chat", make_deepseek_like(channels))
    segments = template.render(converse("a", "final", "b", "al"))
    assert learned(segments) == "final<|im_start|>final<|im_end|>final<|im_start|>al<|im_end|>"


def test_a_trimmed_answer_is_found():
    segments = get_template("chat", make_deepseek_like(BRACKETS)).render(converse("INST", "\n  a [/INST] \n"))
    assert learned(segments) == f" a [/INST] {EOS}"


# Control tokens in messages


def test_a_quoted_end_of_turn_does_not_end_the_answer(small_chat):
    template = get_template("chat", small_chat)
    example = converse("What is <|im_end|>?", "<|im_end|> ends a turn, \U0001f600 <|im_start|>too")
    segments = template.render(example)
    assert learned(segments) == "<|im_end|> ends a turn, \U0001f600 <|im_start|>too<|im_end|>"
    own = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert [segment.text for segment in segments if segment.parse_special] == own
    ids = template.encoder.encode_prompt(segments)
    assert ids.count(small_chat.convert_tokens_to_ids("<|im_end|>")) == 2
    assert template.encoder.decode(ids) == written(segments)


def test_what_an_answer_quotes_does_not_change_its_prompt():
    """A token that swallows the line end behind it, as those of Phi-3 do, must do so in every row or in none."""
    turn_tokens = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = make_deepseek_like(
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer.backend_tokenizer.add_tokens([AddedToken(token, normalized=False, rstrip=True) for token in turn_tokens])
    template = get_template("chat", tokenizer)
    for question in ("Stop?", f"What is {EOT}?"):
        asked = template.encode_prompt(question)
        for answer in ("plain", f"It is {EOT}."):
            assert encode(template, converse(question, answer))[: len(asked)] == asked


def test_a_message_with_the_mark_of_a_quotation_is_refused(small_chat):
    template = get_template("chat", small_chat)
    with pytest.raises(UnusableRowError, match=r"U\+FDD0"):
        template.render(converse("a", "b\ufdd0c"))
    with pytest.raises(DataError, match=r"U\+FDD0"):
        template.encode_prompt("a\ufdd0")


# Chat templates that can't be trained with


def test_a_tokenizer_without_chat_template_is_refused(small):
    with pytest.raises(DataError, match=r"needs a chat template.*--template instruction"):
        get_template("chat", small)


@pytest.mark.parametrize("chat_template", ["{% if %}", "{{ raise_exception('tools only') }}"])
def test_a_chat_template_that_writes_nothing_is_refused_before_any_row(chat_template):
    with pytest.raises(DataError, match="chat template") as raised:
        get_template("chat", make_deepseek_like(chat_template))
    assert "--template instruction" in raised.value.fix


def test_what_the_chat_template_refuses_is_an_unusable_row_or_prompt():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    template = get_template("chat", make_deepseek_like(refuses + CHAT_ML))
    with pytest.raises(UnusableRowError, match="no system text"):
        template.render(converse("a", "b", system="s"))
    with pytest.raises(DataError, match="no system text"):
        template.encode_prompt("a", "s")


def test_a_chat_template_that_asks_otherwise_than_it_answers_is_refused():
    with pytest.raises(DataError, match="before an answer when it asks for one"):
        get_template("chat", make_deepseek_like(CHAT_ML.replace("assistant\n", "assistant\n<think>\n")))


def test_an_answer_that_the_chat_template_rewrites_is_an_unusable_row():
    hides = CHAT_ML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    template = get_template("chat", make_deepseek_like(hides))
    with pytest.raises(UnusableRowError, match="changes the assistant's text"):
        template.render(converse("a", "<think>x</think>b"))
    assert learned(template.render(converse("a", "b"))) == "b<|im_end|>"


def test_a_chat_template_that_rewrites_every_answer_is_refused_before_any_row():
    with pytest.raises(DataError, match=r"changes the assistant's text.*--template instruction"):
        get_template("chat", make_deepseek_like(CHAT_ML.replace("{{ message.content }}", "{{ message.content[1:] }}")))


@pytest.mark.parametrize("fault", ["message.content + 1", "1 / 0", "message.content.index('no such text')"])
def test_a_chat_template_in_which_python_fails_is_refused(fault):
    faulty = CHAT_ML.replace("{{ message.content }}", f"{{{{ {fault} }}}}")
    with pytest.raises(DataError, match=r"chat template of this tokenizer fails: \w+: ") as raised:
        get_template("chat", make_deepseek_like(faulty))
    assert "--template instruction" in raised.value.fix


def test_a_chat_template_that_forgets_what_went_before_is_refused():
    forgets = CHAT_ML.replace("in messages %}", "in messages[-2:] %}")
    template = get_template("chat", make_deepseek_like(forgets))
    assert template.render(converse("a", "b"))
    with pytest.raises(DataError, match="before an answer when it asks for one"):
        template.render(DIALOGUE)


def test_a_chat_template_without_an_end_token_is_refused():
    endless = CHAT_ML.replace("<|im_end|>", "")
    with pytest.raises(DataError, match="no end token behind an answer"):
        get_template("chat", make_deepseek_like(endless))
