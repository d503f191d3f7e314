"""The merged model's chat template: the ids of training for each tokenizer, and what a chat template can't keep."""

from pathlib import Path
from typing import NamedTuple

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsft.core.data.examples import Conversation, Turn
from dsft.core.data.prompts import PromptTemplate, get_template
from dsft.core.data.turns import TurnPieces, find_turn_pieces
from dsft.merge.chat_template import gives_training_ids, write_jinja
from tests.scripted_models import make_tokenizer
from tests.unit.core.data.small_tokenizer import CHAT_ML, EOT, make_deepseek_like, make_prefixing

TEXTS = [
    "Sort a list.",
    "    return x",
    "  {{ braces }} {% if x %} {# no #} \"quotes\" 'too' \\n \\",
    "\n\nline ends\r\n\tand tabs \n",
    "größer – 世界 🙂 \u00a0\u2028",
    "",
    "### Instruction:\nx\n### Response:\n",
]
SYSTEM_TEXTS = [None, "", 'Be "brief" {now}.\n', "  \\ 你好 "]


class Trained(NamedTuple):
    """A prompt template, and the tokenizer with the chat template that was written from it."""

    template: PromptTemplate
    tokenizer: PreTrainedTokenizerFast

    def apply(self, turns: list[Turn]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages_of(turns), add_generation_prompt=turns[-1].role == "user", return_dict=False
        )
        return ids


def make_trained(name: str, tokenizer: PreTrainedTokenizerFast) -> Trained:
    template = get_template(name, tokenizer)
    tokenizer.chat_template = write_jinja(pieces_of(template))
    return Trained(template, tokenizer)


def pieces_of(template: PromptTemplate) -> TurnPieces:
    pieces = find_turn_pieces(template)
    assert pieces is not None
    return pieces


def messages_of(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def converse(texts: list[str], system: str | None = None) -> list[Turn]:
    turns = [] if system is None else [Turn("system", system)]
    return turns + [Turn("assistant", text, True) if i % 2 else Turn("user", text) for i, text in enumerate(texts)]


@pytest.fixture(
    params=["deepseek instruction", "deepseek deepseek", "tiny instruction", "tiny deepseek", "bytes instruction"]
)
def trained(request: pytest.FixtureRequest, repository: Path) -> Trained:
    tokenizer_name, name = request.param.split()
    if tokenizer_name == "bytes":
        return make_trained(name, make_tokenizer())
    folder = repository / "presets" / "tiny" / "model"
    if tokenizer_name == "deepseek":
        folder = request.getfixturevalue("shared") / "assets" / "deepseek-coder-6.7b"
    return make_trained(name, AutoTokenizer.from_pretrained(folder, local_files_only=True))


@pytest.mark.parametrize("system", SYSTEM_TEXTS)
def test_prompts_have_the_ids_of_training(trained, system):
    for text in TEXTS:
        assert trained.apply(converse([text], system)) == trained.template.encode_prompt(text, system)
    for length in range(1, len(TEXTS) + 1, 2):
        for texts in (TEXTS[:length], TEXTS[::-1][:length]):
            turns = converse(texts, system)
            assert trained.apply(turns) == trained.template.encode_prompt(turns)


@pytest.mark.parametrize("system", SYSTEM_TEXTS)
def test_finished_conversations_have_the_ids_of_training(trained, system):
    turns = converse(TEXTS[:-1], system)
    template = trained.template
    assert trained.apply(turns) == template.encoder.encode_prompt(template.render(Conversation(tuple(turns))))
    assert trained.apply(turns)[-1] == template.stop_token_ids[0]


def test_it_is_known_that_the_ids_are_those_of_training(trained):
    assert gives_training_ids(trained.tokenizer.chat_template, trained.template, trained.tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_stands_once_and_only_where_the_tokenizer_puts_one(adds_bos):
    trained = make_trained("deepseek", make_deepseek_like(adds_bos=adds_bos))
    ids = trained.apply(converse(["Sort."]))
    assert ids == trained.template.encode_prompt("Sort.")
    assert ids.count(trained.tokenizer.bos_token_id) == int(adds_bos)


def test_the_words_before_an_answer_stand_there_without_being_asked_for():
    trained = make_trained("instruction", make_deepseek_like())
    messages = messages_of(converse(["Sort."]))
    texts = {
        trained.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=b) for b in (True, False)
    }
    assert len(texts) == 1
    assert texts.pop().endswith("Sort.\n\n### Response:\n")


def test_an_answer_can_be_gone_on_with():
    trained = make_trained("deepseek", make_deepseek_like())
    turns = converse(["Sort.", "def sort("])
    text = trained.tokenizer.apply_chat_template(messages_of(turns), tokenize=False, continue_final_message=True)
    assert text.endswith("### Response:\ndef sort(")


def test_it_outlives_being_saved(tmp_path):
    trained = make_trained("instruction", make_deepseek_like())
    trained.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    turns = converse(TEXTS[:3], "Be brief.")
    assert loaded.apply_chat_template(messages_of(turns), return_dict=False) == trained.template.encode_prompt(turns)


def test_a_control_token_that_a_user_spells_is_text_in_training_alone():
    trained = make_trained("deepseek", make_deepseek_like())
    turns = converse([f"What is {EOT}?"])
    end = trained.template.stop_token_ids[0]
    assert end not in trained.template.encode_prompt(turns)
    assert end in trained.apply(turns)


def test_other_roles_are_refused():
    trained = make_trained("instruction", make_deepseek_like())
    for messages in (
        [{"role": "tool", "content": "4"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    ):
        with pytest.raises(TemplateError, match="system, user and assistant turns"):
            trained.tokenizer.apply_chat_template(messages)


def test_a_system_text_without_a_place_is_refused():
    no_system = CHAT_ML.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    trained = make_trained("chat", make_deepseek_like(no_system))
    assert trained.apply(converse(["Sort."])) == trained.template.encode_prompt("Sort.")
    with pytest.raises(TemplateError, match="without a system text"):
        trained.apply(converse(["Sort."], "Be brief."))


def test_a_tokenizer_that_puts_blanks_before_texts_is_known_to_differ():
    trained = make_trained("instruction", make_prefixing())
    assert trained.apply(converse(["a"])) == trained.template.encode_prompt("a")
    assert trained.apply(converse(["a", "b", "c"])) != trained.template.encode_prompt(converse(["a", "b", "c"]))
    assert not gives_training_ids(trained.tokenizer.chat_template, trained.template, trained.tokenizer)
