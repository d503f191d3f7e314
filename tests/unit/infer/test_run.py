"""`run_infer` from prompt to result: the trained prompt, the tokens transformers gives, and what is said on the way."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from dsft.core.errors import ConfigError, DoesNotFitError, InputError, ModelError, NoGpuError
from dsft.infer.config import InferConfig
from dsft.infer.result import InferResult
from dsft.infer.run import run_infer
from tests.scripted_models import (
    EOS,
    TURN_END,
    make_tokenizer,
    write_adapter,
    write_random_model,
    write_scripted_model,
    write_summary,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


class Transcript:
    """Runs and keeps what was told."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.notices: list[str] = []

    def run(self, prompt: str = "Say something.", **settings: Any) -> InferResult:
        return run_infer(InferConfig(device="cpu", **settings), prompt, self.pieces.append, self.notices.append)


@pytest.fixture
def transcript() -> Transcript:
    return Transcript()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_random_model(folder / "random")
    write_scripted_model(folder / "greeting", "Héy 你😀")
    write_scripted_model(folder / "endless", "abc def\n")
    write_scripted_model(folder / "chat", "Hi!", chat_template=CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def adapter(models: Path) -> tuple[Path, PeftModel]:
    folder = models / "trained_random"
    return folder, write_adapter(folder, models / "random")


def generate_directly(model: Any, prompt: str, num_tokens: int, **settings: Any) -> list[int]:
    tokenizer = make_tokenizer()
    input_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    attention_mask = torch.ones_like(input_ids)
    output = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=num_tokens, pad_token_id=0, **settings
    )
    ids: list[int] = output[0, input_ids.shape[1] :].tolist()
    return ids


def test_an_adapter_answers_in_its_template_with_transformers_tokens(
    adapter: tuple[Path, PeftModel], transcript: Transcript
) -> None:
    folder, model = adapter
    result = transcript.run("Sort a list.", model=str(folder), max_new_tokens=40)
    prompt = "### Instruction:\nSort a list.\n\n### Response:\n"
    tokens = generate_directly(model, prompt, 40, do_sample=False)
    expected = make_tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert result.text == expected
    assert "".join(transcript.pieces) == expected
    assert (result.num_prompt_tokens, result.num_new_tokens) == (len(prompt), len(tokens))
    assert (result.template, result.dtype, result.device, result.seed) == ("instruction", "float32", "cpu", None)
    assert (result.model, result.base) == (str(folder), str(folder.parent / "random"))
    assert transcript.notices == []

    base = LlamaForCausalLM.from_pretrained(folder.parent / "random")
    assert generate_directly(base, prompt, 40, do_sample=False) != tokens


def test_sampling_is_transformers_for_the_seed_and_repeats(
    adapter: tuple[Path, PeftModel], transcript: Transcript
) -> None:
    folder, model = adapter
    settings = {"temperature": 0.8, "top_p": 0.95, "top_k": 30, "repetition_penalty": 1.1}
    result = transcript.run("go", model=str(folder), is_raw=True, max_new_tokens=30, seed=11, **settings)
    torch.manual_seed(11)
    tokens = generate_directly(model, "go", 30, do_sample=True, **settings)
    assert result.text == make_tokenizer().decode(tokens, skip_special_tokens=True)
    assert result.seed == 11
    drawn = transcript.run("go", model=str(folder), max_new_tokens=30, temperature=1.0)
    assert drawn.seed is not None
    assert (
        transcript.run("go", model=str(folder), max_new_tokens=30, temperature=1.0, seed=drawn.seed).text == drawn.text
    )


def test_characters_of_several_tokens_come_whole_and_the_answer_ends_by_itself(
    models: Path, transcript: Transcript
) -> None:
    result = transcript.run(model=str(models / "greeting"))
    assert transcript.pieces == list("Héy 你😀")
    assert result.text == "Héy 你😀"
    assert result.stop_reason == "end_token"
    assert result.num_new_tokens == len("Héy 你😀".encode()) + 1
    assert result.base is None
    assert result.time_to_first_token_s > 0
    assert result.tok_per_s is not None and result.tok_per_s > 0


@pytest.mark.parametrize(
    ("stop", "text"),
    [(("ef",), "abc d"), (("\n",), "abc def"), (("x", "c d", "ef"), "ab"), (("abc",), ""), (("\nabc",), "abc def")],
)
def test_a_stop_text_ends_the_answer_and_is_not_told(
    models: Path, transcript: Transcript, stop: tuple[str, ...], text: str
) -> None:
    result = transcript.run(model=str(models / "endless"), stop=stop)
    assert (result.text, result.stop_reason) == (text, "stop_string")
    assert "".join(transcript.pieces) == text
    assert result.num_new_tokens <= 12


def test_the_limit_of_tokens_cuts_the_answer(models: Path, transcript: Transcript) -> None:
    result = transcript.run(model=str(models / "endless"), max_new_tokens=10)
    assert (result.text, result.num_new_tokens, result.stop_reason) == ("abc def\nab", 10, "max_new_tokens")
    result = transcript.run(model=str(models / "greeting"), max_new_tokens=2)  # in the middle of é
    assert result.text == "H\ufffd"


def test_a_single_token_has_no_rate(models: Path, transcript: Transcript) -> None:
    assert transcript.run(model=str(models / "endless"), max_new_tokens=1).tok_per_s is None


def test_what_is_held_back_for_a_stop_text_comes_at_the_end(models: Path, transcript: Transcript) -> None:
    result = transcript.run(model=str(models / "greeting"), stop=("😀!",))
    assert (result.text, result.stop_reason) == ("Héy 你😀", "end_token")


def test_the_context_limits_the_answer_with_a_word(tmp_path: Path, transcript: Transcript) -> None:
    folder = write_scripted_model(tmp_path / "short", "abc def\n", max_position_embeddings=64)
    result = transcript.run("12345\n", model=str(folder), is_raw=True)
    assert (result.num_new_tokens, result.stop_reason) == (64 - 6, "context_full")
    assert any("At most 58 new tokens" in notice for notice in transcript.notices)
    assert transcript.run("12345\n", model=str(folder), is_raw=True, max_new_tokens=58).stop_reason == "max_new_tokens"
    with pytest.raises(InputError, match=r"64 tokens, and .* reads at most 64"):
        transcript.run("x" * 64, model=str(folder), is_raw=True)


def test_the_newest_run_is_taken_and_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transcript: Transcript
) -> None:
    write_adapter(tmp_path / "trained_new", models / "greeting")
    monkeypatch.chdir(tmp_path)
    result = transcript.run()
    assert result.model == "./trained_new"
    assert transcript.notices == ["Model: ./trained_new, the newest finished run."]


def test_no_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transcript: Transcript) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no finished run"):
        transcript.run()


def test_without_a_record_the_tokenizer_decides_the_template(models: Path, transcript: Transcript) -> None:
    assert transcript.run(model=str(models / "chat")).template == "chat"
    assert transcript.run(model=str(models / "greeting")).template == "instruction"
    chat, instruction = transcript.notices
    assert chat.startswith("Template: chat, because the tokenizer has a chat template")
    assert instruction.startswith("Template: instruction, because the tokenizer has no chat template")


def test_the_recorded_template_counts_before_the_tokenizers(
    models: Path, tmp_path: Path, transcript: Transcript
) -> None:
    folder = Path(shutil.copytree(models / "chat", tmp_path / "chat"))
    write_summary(folder, str(folder), "instruction")
    assert transcript.run(model=str(folder)).template == "instruction"
    assert transcript.notices == []
    assert transcript.run(model=str(folder), template="chat").template == "chat"
    assert transcript.notices == [f"{folder} was trained with the template instruction, not chat."]


def test_the_system_text_reaches_the_chat_template(models: Path, transcript: Transcript) -> None:
    without = transcript.run("x", model=str(models / "chat"))
    system = transcript.run("x", model=str(models / "chat"), system="Be brief.")
    assert system.num_prompt_tokens == without.num_prompt_tokens + len("<system>\nBe brief.\n")


def test_a_template_without_a_system_text_says_so_chosen_or_recorded(
    models: Path, tmp_path: Path, transcript: Transcript
) -> None:
    folder = Path(shutil.copytree(models / "greeting", tmp_path / "greeting"))
    write_summary(folder, str(folder), "text")
    for model, settings in ((folder, {}), (models / "greeting", {"template": "text"})):
        with pytest.raises(InputError) as caught:
            transcript.run("x", model=str(model), system="Be brief.", **settings)
        assert caught.value.found == "The template text has no place for a system text."
        assert caught.value.fix == "Leave --system out, or choose another --template."


def test_a_prompt_the_template_refuses_is_told(models: Path, transcript: Transcript) -> None:
    with pytest.raises(InputError, match=r"prompt can't be written: .*U\+FDD0"):
        transcript.run("x\ufdd0", model=str(models / "chat"))


def test_the_spelling_of_a_control_token_is_text_in_a_template_and_a_token_in_a_raw_prompt(
    models: Path, transcript: Transcript
) -> None:
    path = str(models / "greeting")
    with_letter = transcript.run("x", model=path).num_prompt_tokens
    assert transcript.run(EOS, model=path).num_prompt_tokens == with_letter - 1 + len(EOS)
    assert transcript.run(f"{EOS}x", model=path, is_raw=True, max_new_tokens=1).num_prompt_tokens == 2


def test_a_raw_prompt_is_given_as_it_is(models: Path, transcript: Transcript) -> None:
    result = transcript.run("a", model=str(models / "endless"), is_raw=True, max_new_tokens=3)
    assert (result.text, result.num_prompt_tokens, result.template) == ("bc ", 1, None)
    assert transcript.notices == []


def test_the_models_own_end_tokens_end_an_answer_too(tmp_path: Path, transcript: Transcript) -> None:
    folder = write_scripted_model(tmp_path / "model", "abc def\n", eos_token_id=[257, ord("d") - 33])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(ord("d") - 33) == "d"
    assert transcript.run(model=str(folder)).text == "abc "


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, transcript: Transcript) -> None:
    folder = write_scripted_model(tmp_path / "model", "abc")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_END, "<far>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"gives token 259, but .* has only 259 tokens"):
        transcript.run("<far>", model=str(folder), is_raw=True)


def test_a_missing_gpu_is_an_error_before_anything_loads(models: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoGpuError) as caught:
        run_infer(InferConfig(model=str(models / "greeting"), device="cuda"), "x", print, print)
    assert caught.value.exit_code == 5


def test_too_little_gpu_memory_is_told_with_ways_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, transcript: Transcript
) -> None:
    def load(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("dsft.infer.session.load_model", load)
    with pytest.raises(DoesNotFitError, match=r"2\.00 GiB") as caught:
        transcript.run(model=str(models / "greeting"))
    assert "--load-in-4bit" in caught.value.fix


def test_base_takes_another_base(models: Path, tmp_path: Path, transcript: Transcript) -> None:
    folder = tmp_path / "trained_x"
    write_adapter(folder, models / "random", base_name="./moved/away")
    result = transcript.run(model=str(folder), base=str(models / "random"), max_new_tokens=4)
    assert result.base == str(models / "random")
    assert transcript.notices == []
    result = transcript.run(model=str(folder), max_new_tokens=4)
    assert result.base == str(models / "random")
    (notice,) = transcript.notices
    assert "./moved/away is not there" in notice
    with pytest.raises(ConfigError, match="no adapter folder"):
        transcript.run(model=str(models / "random"), base="other")


def test_4bit_answers(models: Path, transcript: Transcript) -> None:
    assert transcript.run(model=str(models / "greeting"), use_4bit=True).text == "Héy 你😀"


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_refuses_an_empty_prompt(models: Path, transcript: Transcript, prompt: str) -> None:
    with pytest.raises(InputError, match="empty"):
        transcript.run(prompt, model=str(models / "greeting"))


def test_refuses_bytes_that_are_no_text(models: Path, transcript: Transcript) -> None:
    with pytest.raises(InputError, match="prompt is not valid UTF-8 at character 3"):
        transcript.run("ab\udcff", model=str(models / "greeting"))
