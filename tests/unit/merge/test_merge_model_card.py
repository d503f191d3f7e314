"""The card of a merged model: what the hub reads, commands that can be pasted, figures, and no path of the user."""

import dataclasses
import re
import shlex
from typing import Any

import pytest
import yaml

from dsft.merge.model_card import render_merged_card, suggest_ollama_name
from dsft.train.model_card import render_model_card
from tests.merge_results import make_merge_result, make_verification
from tests.train_results import make_result


def summary_of_a_run(**changes: Any) -> dict[str, Any]:
    return dataclasses.asdict(make_result(**changes))


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    fields: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return fields


def commands(card: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)\n```", card, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def snippet(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_hub_is_told_what_the_model_was_made_of() -> None:
    fields = front_matter(render_merged_card(make_merge_result(), training=summary_of_a_run()))
    assert fields == {
        "base_model": "deepseek-ai/deepseek-coder-6.7b-base",
        "base_model_relation": "finetune",
        "datasets": ["sahil2801/CodeAlpaca-20k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "merged", "dsft"],
    }


def test_a_local_base_is_no_id_of_the_hub() -> None:
    fields = front_matter(render_merged_card(make_merge_result(base="builtin:tiny/model")))
    assert "base_model" not in fields
    assert "base_model_relation" not in fields
    assert "datasets" not in fields


def test_the_commands_name_the_folder_and_can_be_pasted() -> None:
    card = render_merged_card(make_merge_result(output="my models/first"))
    infer, serve = commands(card)
    assert infer[:2] == ["dsft", "infer"]
    assert infer[3:] == ["--model", "my models/first"]
    assert serve == ["vllm", "serve", "my models/first"]


def test_ollama_is_named_where_there_is_a_gguf_file() -> None:
    card = render_merged_card(make_merge_result(gguf="model-q8_0.gguf", gguf_type="q8_0"))
    assert commands(card)[2:] == [
        ["ollama", "create", "trained_deepseek", "-f", "trained_deepseek/merged_model/Modelfile"],
        ["ollama", "run", "trained_deepseek"],
    ]
    assert "| GGUF | `model-q8_0.gguf`, q8_0 |" in card
    assert "ollama" not in render_merged_card(make_merge_result())


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("trained_deepseek/merged_model", "trained_deepseek"),
        ("merged_model", "merged_model"),
        ("/srv/My Models/Größe 1", "gr-e-1"),
        ("..", "merged"),
        ("模型", "merged"),
    ],
)
def test_the_name_for_ollama_is_one_it_takes(output: str, expected: str) -> None:
    assert suggest_ollama_name(make_merge_result(output=output)) == expected


def test_the_python_compiles_and_asks_with_the_trained_prompt() -> None:
    prompt = '<s>### Instruction:\nSay "hi" \\ bye.\n\n### Response:\n'
    code = snippet(render_merged_card(make_merge_result(), training=summary_of_a_run(example_prompt=prompt)))
    compile(code, "card", "exec")
    assert '"trained_deepseek/merged_model"' in code
    assert "add_special_tokens=False" in code
    assignment = next(line for line in code.splitlines() if line.startswith("prompt = "))
    namespace: dict[str, str] = {}
    exec(assignment, namespace)
    assert namespace["prompt"] == prompt


def test_without_a_recorded_prompt_the_tokenizer_adds_its_special_tokens() -> None:
    code = snippet(render_merged_card(make_merge_result(template=None)))
    compile(code, "card", "exec")
    assert "add_special_tokens" not in code


def test_both_cards_generate_alike() -> None:
    result = make_result()
    ours = snippet(render_merged_card(make_merge_result(), training=dataclasses.asdict(result)))
    theirs = snippet(render_model_card(result))
    assert ours[ours.index("prompt = ") :] == theirs[theirs.index("prompt = ") :]


def test_how_it_was_merged_and_checked_is_told() -> None:
    card = render_merged_card(
        make_merge_result(base_rounding="nf4"), versions={"torch": "2.13.0"}, chat_template_note="It has none."
    )
    for words in (
        "`deepseek-ai/deepseek-coder-6.7b-base` at `0123abc`, rounded to NF4 and back",
        "it changes 224 tensors",
        "6,740,512,768, summed in float32 and rounded once to bfloat16",
        "| Left of the update after rounding | 99.9 % |",
        "| Difference of a logit | mean 0.00211, greatest 0.0312 |",
        "| KL divergence | mean 1.25e-06 nats, greatest 3.5e-05 |",
        "| Same likeliest token | at 511 of 512 positions |",
        "mean 0.00209: so much PEFT's own merge differs, rounded to bfloat16",
        "mean 1.23e-05: between",
        "Merged with torch 2.13.0.",
        "It has none.",
    ):
        assert words in card, words


def test_what_was_not_done_is_not_claimed() -> None:
    card = render_merged_card(make_merge_result(verification=None, update_kept=None, base_revision=None))
    assert "was not compared" in card
    assert "KL" not in card
    assert "Left of the update" not in card
    assert "Training" not in card
    assert "None" not in card
    assert "base`, as stored" in card


def test_one_differing_token_in_very_many_is_not_rounded_away() -> None:
    verification = make_verification(num_tokens=1_000_000, top_token_agreement=0.999999)
    assert "999,999 of 1,000,000" in render_merged_card(make_merge_result(verification=verification))


def test_the_run_that_trained_the_adapter_is_told() -> None:
    card = render_merged_card(make_merge_result(), training=summary_of_a_run())
    assert "| Data | `sahil2801/CodeAlpaca-20k` |" in card
    assert "| LoRA | rank 64, alpha 128 |" in card
    assert "| Steps | 40 (3 epochs) |" in card
    assert "| Best validation loss | 0.7000 at step 20 |" in card


def test_a_summary_that_lacks_fields_is_told_as_far_as_it_goes() -> None:
    card = render_merged_card(make_merge_result(), training={"config": {"lora_r": 8}, "num_steps": 3, "model": None})
    assert "Training of the adapter" not in card
    assert "rank 8, alpha 4" in render_merged_card(
        make_merge_result(), training={"config": {"lora_r": 8, "lora_alpha": 4.0}}
    )


def test_the_card_names_no_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    training = summary_of_a_run(config={"dataset": "/home/ada/data.jsonl"}, example_prompt="Hello")
    result = make_merge_result(
        base="/home/ada/models/smol", adapter="~/runs/first", output="/data/ada/runs/merged", gguf="a.gguf"
    )
    card = render_merged_card(result, training=training)
    assert "/ada" not in card
    assert "~" not in card
    assert "`./smol`" in card
    assert "`./first`" in card
    assert ["vllm", "serve", "./merged"] in commands(card)
    assert ["ollama", "create", "merged", "-f", "./merged/Modelfile"] in commands(card)
    assert '"./merged"' in snippet(card)
