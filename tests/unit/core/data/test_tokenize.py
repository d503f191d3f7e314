"""From examples to samples: loss masks by position, end tokens that are exact and last, and samples that fit."""

import json
from itertools import pairwise

import numpy as np
import pytest

from dsft.core.data.examples import Conversation, FimTriple, RawText, Turn, hash_text, prompt_of
from dsft.core.data.prompts import FimPrompt, get_template
from dsft.core.data.tokenize import LengthRule, PlacedExample, SampleBatch, SampleMaker
from tests.unit.core.data.conversations import converse
from tests.unit.core.data.small_tokenizer import BOS, CHAT_ML, EOS, EOT, make_deepseek_like

LONG = 100_000


def make_batch(template, *examples, max_length=LONG, over_length="drop", loss_on="response", seed=0) -> SampleBatch:
    maker = SampleMaker(template, LengthRule(max_length, over_length, loss_on, seed))
    batch = maker.make([PlacedExample(10 * n, f"f.jsonl:{10 * n + 1}", example) for n, example in enumerate(examples)])
    check_shapes(batch, max_length)
    return batch


def check_shapes(batch: SampleBatch, max_length: int) -> None:
    assert batch.token_ids.dtype == np.uint32 and batch.is_target.dtype == np.bool_
    assert len(batch.token_ids) == len(batch.is_target) == batch.lengths.sum()
    assert len(batch.lengths) == len(batch.rows) == len(batch.prompts)
    assert all(0 < length <= max_length for length in batch.lengths)


def samples_of(batch: SampleBatch) -> list[tuple[list[int], list[bool]]]:
    """Return ids and loss mask of each sample."""
    cuts = np.cumsum(batch.lengths)[:-1]
    ids, masks = np.split(batch.token_ids, cuts), np.split(batch.is_target, cuts)
    return [(part.tolist(), mask.tolist()) for part, mask in zip(ids, masks, strict=True)]


def only(batch: SampleBatch) -> tuple[list[int], list[bool]]:
    (sample,) = samples_of(batch)
    return sample


def learned(template, sample: tuple[list[int], list[bool]]) -> str:
    return template.encoder.decode([token_id for token_id, is_target in zip(*sample, strict=True) if is_target])


def read(template, sample: tuple[list[int], list[bool]]) -> str:
    return template.encoder.decode(sample[0])


@pytest.fixture(scope="module")
def instruction(small):
    return get_template("instruction", small)


@pytest.fixture(scope="module")
def text(small):
    return get_template("text", small)


# What carries loss


def test_only_the_response_and_its_end_token_carry_loss(instruction):
    ids, mask = only(make_batch(instruction, converse("Sort.", "sorted(x)")))
    num_prompt = len(instruction.encode_prompt("Sort."))
    assert mask == [False] * num_prompt + [True] * (len(ids) - num_prompt)
    assert learned(instruction, (ids, mask)) == f"sorted(x){EOS}"


def test_the_end_token_carries_loss_though_it_is_also_the_padding_token(small, instruction):
    """By token id it would be masked as padding, and the model would never stop (trl#976)."""
    assert small.pad_token_id == small.eos_token_id
    ids, mask = only(make_batch(instruction, converse("Sort.", "sorted(x)")))
    assert ids[-1] == small.eos_token_id and mask[-1]


def test_masks_follow_positions_not_ids(small, instruction):
    """The same end token is given behind the first answer and learned behind the second."""
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "a"), Turn("assistant", "b", is_target=True))
    ids, mask = only(make_batch(instruction, Conversation(turns)))
    ends = [index for index, token_id in enumerate(ids) if token_id == small.eos_token_id]
    assert [mask[index] for index in ends] == [False, True]
    assert learned(instruction, (ids, mask)) == f"b{EOS}"


@pytest.mark.parametrize(("name", "after"), [("instruction", EOS), ("deepseek", f"\n{EOT}"), ("chat", "<|im_end|>")])
def test_each_answer_of_a_conversation_is_learned(small_chat, name, after):
    template = get_template(name, small_chat)
    sample = only(make_batch(template, converse("a?", "one", "b?", "two", "c?", "three", system="Be brief.")))
    assert learned(template, sample) == f"one{after}two{after}three{after}"


@pytest.mark.parametrize("name", ["instruction", "deepseek", "chat"])
def test_with_loss_on_all_everything_but_the_first_token_is_learned(small_chat, name):
    template = get_template(name, small_chat)
    example = converse("Sort.", "sorted(x)")
    ids, mask = only(make_batch(template, example, loss_on="all"))
    assert ids == only(make_batch(template, example))[0]
    assert mask == [False] + [True] * (len(ids) - 1)


def test_bos_is_never_learned(small, text):
    for loss_on in ("response", "all"):
        ids, mask = only(make_batch(text, RawText("x = 1", True), loss_on=loss_on))
        assert ids[0] == small.bos_token_id
        assert mask == [False] + [True] * (len(ids) - 1)


def test_without_bos_the_first_token_can_t_be_learned():
    template = get_template("text", make_deepseek_like(adds_bos=False))
    ids, mask = only(make_batch(template, RawText("x = 1", True)))
    assert template.encoder.decode(ids) == f"x = 1{EOS}"
    assert mask == [False] + [True] * (len(ids) - 1)


def test_every_sample_of_a_batch_has_its_own_first_token_masked(text):
    batch = make_batch(text, *(RawText(letter * 3, True) for letter in "abc"), loss_on="all")
    assert [mask[:2] for _, mask in samples_of(batch)] == [[False, True]] * 3


# Real rows, real ids


def test_real_rows_are_the_text_of_the_template_and_their_answers_are_learned(deepseek, shared):
    with (shared / "data" / "codealpaca-6k.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(150), file, strict=False)]
    template = get_template("instruction", deepseek)
    batch = make_batch(template, *(converse(row["instruction"], row["output"]) for row in rows))
    samples = samples_of(batch)
    assert len(samples) == len(rows) == 150
    for row, (ids, mask) in zip(rows, samples, strict=True):
        prompt = f"### Instruction:\n{row['instruction']}\n\n### Response:\n"
        prompt_ids = deepseek(prompt)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids and ids[0] == 32013
        answer_ids = deepseek(row["output"], add_special_tokens=False)["input_ids"]
        assert ids[len(prompt_ids) :] == [*answer_ids, 32014]
        assert mask == [False] * len(prompt_ids) + [True] * (len(answer_ids) + 1)


@pytest.mark.parametrize(("name", "end_id"), [("instruction", 32014), ("deepseek", 32021), ("fim", 32014)])
def test_the_end_token_is_exact_and_last_and_stands_there_once(deepseek, name, end_id):
    template = get_template(name, deepseek)
    end = deepseek.convert_ids_to_tokens(end_id)
    if name == "fim":
        examples = [FimTriple("a", f"b{end}", f"c{end}"), FimTriple("", "", "c ")]
    else:
        examples = [converse(f"a{end}", f"b{end}"), converse("a", "b ")]
    for ids, mask in samples_of(make_batch(template, *examples)):
        assert ids[-1] == end_id and ids.count(end_id) == 1 and mask[-1]


# Too long


def test_a_sample_of_just_the_longest_length_is_kept_and_a_longer_one_is_not(instruction):
    example = converse("Sort.", "sorted(x)")
    length = len(only(make_batch(instruction, example))[0])
    for over_length in ("drop", "truncate"):
        kept = make_batch(instruction, example, max_length=length, over_length=over_length)
        assert kept.lengths.tolist() == [length] and not kept.fate.outcomes
    left_out = make_batch(instruction, example, max_length=length - 1)
    assert left_out.lengths.tolist() == []
    assert left_out.fate.outcomes == {"over_length": 1}
    assert left_out.fate.left_out_lengths == [length]


def test_the_rows_around_one_that_is_left_out_keep_their_numbers(instruction):
    batch = make_batch(instruction, converse("a", "b"), converse("a", "b" * 200), converse("c", "d"), max_length=60)
    assert batch.rows.tolist() == [0, 20]
    assert [read(instruction, sample)[-len(f"d{EOS}") :] for sample in samples_of(batch)] == [f"b{EOS}", f"d{EOS}"]


@pytest.mark.parametrize(("name", "end"), [("instruction", EOS), ("deepseek", EOT), ("chat", "<|im_end|>")])
def test_a_truncated_answer_keeps_its_end_token_as_its_last_and_learns_it(small_chat, name, end):
    template = get_template(name, small_chat)
    num_prompt = len(template.encode_prompt("Sort."))
    example = converse("Sort.", "0123456789" * 5)
    for room in (2, 3, 20):
        batch = make_batch(template, example, max_length=num_prompt + room, over_length="truncate")
        ids, mask = only(batch)
        assert ids[:num_prompt] == template.encode_prompt("Sort.")
        assert learned(template, (ids, mask)) == ("0123456789" * 5)[: room - 1] + end
        assert ids[-1] == template.stop_token_ids[0] and len(ids) == num_prompt + room
        assert batch.fate.outcomes == {"truncated": 1} and batch.fate.left_out_lengths == []


def test_a_truncated_middle_keeps_its_end_token(small):
    template = get_template("fim", small)
    num_prompt = len(template.encode_prompt(FimPrompt("ab", "cd")))
    example = FimTriple("ab", "cd", "0123456789")
    batch = make_batch(template, example, max_length=num_prompt + 4, over_length="truncate")
    assert learned(template, only(batch)) == f"012{EOS}"


def test_a_truncated_answer_has_only_whole_characters(instruction):
    num_prompt = len(instruction.encode_prompt("Sort."))
    answer = "1é2你3\U0001f6004" * 3
    example = converse("Sort.", answer)
    length = len(only(make_batch(instruction, example))[0])
    for max_length in range(num_prompt + 2, length):
        batch = make_batch(instruction, example, max_length=max_length, over_length="truncate")
        kept = learned(instruction, only(batch)).removesuffix(EOS)
        assert kept and answer.startswith(kept)
        # No more is given up than the character that is cut.
        assert max_length - int(batch.lengths[0]) < 4


def test_without_room_for_one_token_of_the_answer_the_row_is_left_out(instruction):
    """An end token alone would teach the model to say nothing."""
    num_prompt = len(instruction.encode_prompt("Sort."))
    for answer, max_length in (("12", num_prompt + 1), ("12", num_prompt), ("12", 8), ("\U0001f600", num_prompt + 4)):
        batch = make_batch(instruction, converse("Sort.", answer), max_length=max_length, over_length="truncate")
        assert batch.lengths.tolist() == []
        assert batch.fate.outcomes == {"no_room": 1}
        assert len(batch.fate.left_out_lengths) == 1


def test_a_conversation_is_cut_in_an_answer_or_behind_the_one_before(instruction):
    first, second = converse("a?", "1234"), converse("a?", "1234", "b?", "5678")
    num_first = len(only(make_batch(instruction, first))[0])
    num_prompt = len(instruction.encode_prompt(second.turns[:3]))
    for max_length in range(num_first, num_prompt + 5):
        batch = make_batch(instruction, second, max_length=max_length, over_length="truncate")
        room = max(0, max_length - num_prompt - 1)
        kept = "5678"[:room] + EOS if room else ""
        assert learned(instruction, only(batch)) == f"1234{EOS}{kept}"
        assert batch.token_ids[-1] == instruction.stop_token_ids[0]
        assert batch.fate.outcomes == {"truncated": 1}


def test_a_cut_in_the_first_answer_keeps_nothing_of_the_second(instruction):
    num_prompt = len(instruction.encode_prompt("a?"))
    example = converse("a?", "1234", "b?", "5678")
    batch = make_batch(instruction, example, max_length=num_prompt + 3, over_length="truncate")
    assert learned(instruction, only(batch)) == f"12{EOS}"
    assert "b?" not in read(instruction, only(batch))


def test_an_answer_that_is_given_does_not_count_as_one_to_learn(instruction):
    turns = (Turn("user", "a"), Turn("assistant", "given" * 9), Turn("user", "b"), Turn("assistant", "new", True))
    example = Conversation(turns)
    batch = make_batch(instruction, example, max_length=60, over_length="truncate")
    assert batch.fate.outcomes == {"no_room": 1}


# Texts


@pytest.mark.parametrize("over_length", ["drop", "truncate"])
@pytest.mark.parametrize("max_length", [8, 20, 33, 50])
def test_a_long_text_becomes_windows_that_learn_each_token_once(small, text, max_length, over_length):
    source = "".join(f"x{number} = '你'\n" for number in range(12))
    whole = only(make_batch(text, RawText(source, True)))[0]
    batch = make_batch(text, RawText(source, True), max_length=max_length, over_length=over_length)
    samples = samples_of(batch)
    assert sum((ids[1:] for ids, _ in samples), []) == whole[1:]
    for ids, mask in samples:
        assert ids[0] == small.bos_token_id and mask == [False] + [True] * (len(ids) - 1)
    assert max(batch.lengths) - min(batch.lengths) <= 1 and len(samples) == -(-(len(whole) - 1) // (max_length - 1))
    assert batch.fate.outcomes == {"split": 1} and batch.fate.left_out_lengths == []
    assert batch.rows.tolist() == [0] * len(samples) and len(set(batch.prompts.tolist())) == 1


def test_without_bos_a_window_begins_with_the_token_before_it():
    template = get_template("text", make_deepseek_like(adds_bos=False))
    source = "".join(f"{number}" for number in range(30))
    whole = only(make_batch(template, RawText(source, True)))[0]
    samples = samples_of(make_batch(template, RawText(source, True), max_length=10))
    taught = [token_id for ids, mask in samples for token_id, is_target in zip(ids, mask, strict=True) if is_target]
    assert taught == whole[1:]
    assert all(later[0][0] == earlier[0][-1] for earlier, later in pairwise(samples))


def test_only_the_last_window_of_a_text_ends_with_the_end_token(text):
    maker = SampleMaker(text, LengthRule(10, "drop", "response", 0))
    batch = maker.make([PlacedExample(0, "a.txt", RawText("0123456789" * 3, True))])
    ends = maker.ends_with_learned_stop(batch)
    assert len(ends) > 2 and ends.tolist() == [False] * (len(ends) - 1) + [True]


def test_source_texts_become_one_sample_a_window(small):
    template = get_template("fim", small)
    texts = [RawText("".join(f"f{n}(x{m})\n" for n in range(20)), False) for m in range(3)]
    batch = make_batch(template, *texts, max_length=60)
    assert batch.fate.outcomes["split"] == 3 and batch.fate.outcomes["window_left_out"] == 0
    assert sorted(set(batch.rows.tolist())) == [0, 10, 20]
    for ids, mask in samples_of(batch):
        assert ids[-1] == small.eos_token_id and mask[-1] and not all(mask)
    other_seed = make_batch(template, *texts, max_length=60, seed=1)
    assert other_seed.token_ids.tolist() != batch.token_ids.tolist()
    assert make_batch(template, *texts, max_length=60).token_ids.tolist() == batch.token_ids.tolist()


def test_a_text_of_which_one_window_is_used_did_not_become_several_samples(small):
    # A gap in the second window would have to begin or end at its one letter.
    source = "print(x)\n" * 330 + " " * 2900 + "x\n"
    batch = make_batch(get_template("fim", small), RawText(source, False), max_length=3010)
    assert len(batch.lengths) == 1
    assert batch.fate.outcomes["window_left_out"] == 1 and batch.fate.outcomes["split"] == 0


# The rest of a batch


def test_rows_the_template_refuses_are_named_and_the_others_are_used():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    template = get_template("chat", make_deepseek_like(refuses + CHAT_ML))
    examples = converse("a", "b"), converse("a", "b", system="s"), converse("c", "d")
    batch = make_batch(template, *examples)
    assert batch.rows.tolist() == [0, 20]
    assert batch.prompts.tolist() == [hash_text(prompt_of(examples[0])), hash_text(prompt_of(examples[2]))]
    (bad,) = batch.fate.bad_rows
    assert (bad.number, bad.where) == (10, "f.jsonl:11") and "no system text" in bad.reason


def test_samples_of_one_prompt_share_its_hash(instruction):
    batch = make_batch(instruction, converse("a", "b"), converse("a", "c"), converse("d", "b"))
    first, second, third = batch.prompts.tolist()
    assert first == second != third


def test_an_end_token_that_is_not_learned_is_told_from_one_that_is(instruction):
    maker = SampleMaker(instruction, LengthRule(LONG, "drop", "response", 0))
    batch = maker.make([PlacedExample(n, "", converse("a", "b")) for n in range(3)])
    last = np.cumsum(batch.lengths) - 1
    batch.is_target[last[0]] = False
    batch.token_ids[last[2]] = 5
    assert maker.ends_with_learned_stop(batch).tolist() == [False, True, False]


def test_an_empty_batch_makes_no_samples(instruction):
    batch = make_batch(instruction)
    assert len(batch.lengths) == len(batch.token_ids) == 0
    assert SampleMaker(instruction, LengthRule(8, "drop", "all", 0)).ends_with_learned_stop(batch).tolist() == []


def test_bos_is_written_once(small, instruction):
    quoting = make_batch(instruction, converse(f"{BOS}a", f"{BOS}b"), converse("a", "b"))
    assert [ids.count(small.bos_token_id) for ids, _ in samples_of(quoting)] == [1, 1]
