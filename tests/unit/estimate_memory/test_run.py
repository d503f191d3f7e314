"""The estimate of presets and of one configuration: complete, consistent and the same each time."""

import json
from pathlib import Path

import pytest

from dsft.core.errors import ConfigError, DoesNotFitError, ModelError, UnreachableHubError
from dsft.core.memory.cards import card_of_memory, find_card
from dsft.core.memory.model_shape import BUILTIN_CONFIGS
from dsft.core.memory.remedies import least_budget_bytes
from dsft.core.units import format_gib
from dsft.estimate_memory.budget import Budget
from dsft.estimate_memory.fit import check_configuration, check_presets
from dsft.estimate_memory.model import find_shape
from dsft.estimate_memory.record import record_breakdown, record_comparison
from dsft.estimate_memory.run import break_down, compare_presets
from tests.unit.estimate_memory.estimates import BUDGET, configure, write_model

EIGHT_GIB = Budget(card_of_memory(8), "vram")


def test_every_preset_on_a_gpu_is_planned_with_the_seed_s_figure_beside_it() -> None:
    result = compare_presets(BUDGET)
    assert {preset.name: preset.seed_memory_gb for preset in result.presets} == {
        "conservative": 18,
        "balanced": 20,
        "quality": 22,
    }
    assert result.fits
    assert result.notices == ("tiny trains on the CPU and is left out.",)
    for preset in result.presets:
        assert preset.planned.job.workload.longest_sequence == preset.config.max_length
        assert preset.planned.chosen.memory.least_process_bytes <= preset.planned.job.allowed_bytes


def test_a_small_card_does_not_take_them_all() -> None:
    result = compare_presets(Budget(card_of_memory(7), "vram"))
    misfits = [preset.name for preset in result.presets if not preset.planned.chosen.fits]
    assert misfits
    assert not result.fits
    with pytest.raises(DoesNotFitError) as raised:
        check_presets(result)
    for name in misfits:
        assert f"{name} needs" in raised.value.found
        assert f"Enough for {name} would be --" in raised.value.fix
    check_presets(compare_presets(BUDGET))


def test_terms_and_totals_of_a_breakdown_agree() -> None:
    result = break_down(configure(max_length=512), BUDGET)
    memory = result.planned.chosen.memory
    assert sum(term.num_bytes for term in memory.terms) == memory.device_bytes
    assert result.remedies == ()
    assert result.least_budget_bytes < BUDGET.budget_bytes
    assert result.longest_possible is None
    assert set(result.generation) == {"4 bits, with the adapter", "16 bits, with the adapter", "16 bits, merged"}
    four, sixteen, merged = (memory.process_bytes for memory in result.generation.values())
    assert four < merged < sixteen
    check_configuration(result)


def test_what_does_not_fit_says_by_how_much_and_what_would_help() -> None:
    result = break_down(configure(plan="off", gradient_checkpointing=False), EIGHT_GIB)
    assert result.explanation.startswith("does not fit: needs ")
    assert any(remedy.fits for remedy in result.remedies)
    with pytest.raises(DoesNotFitError) as raised:
        check_configuration(result)
    assert "GiB more than the 7.6 GiB a plan may take" in raised.value.found
    for remedy in result.remedies:
        assert (f"{remedy.change} (saves " in raised.value.fix) == remedy.fits


def test_what_no_setting_makes_fit_is_told_so() -> None:
    result = break_down(configure(), Budget(card_of_memory(2), "vram"))
    with pytest.raises(DoesNotFitError) as raised:
        check_configuration(result)
    needs = format_gib(result.least_budget_bytes)
    assert raised.value.fix == f"No change of the settings is enough; it takes a card with {needs} free."


def test_each_remedy_is_one_of_several_and_so_is_a_larger_card() -> None:
    result = break_down(configure(plan="off", gradient_checkpointing=False), EIGHT_GIB)
    with pytest.raises(DoesNotFitError) as raised:
        check_configuration(result)
    ways = [f"{each.change} (saves {format_gib(each.saved_bytes)})" for each in result.remedies if each.fits]
    assert len(ways) > 1
    ways.append(f"a card with {format_gib(result.least_budget_bytes)} free")
    assert raised.value.fix == f"Enough would be {', or '.join(ways)}."


def test_of_presets_that_no_setting_makes_fit_each_has_its_sentence() -> None:
    result = compare_presets(Budget(card_of_memory(3), "vram"))
    with pytest.raises(DoesNotFitError) as raised:
        check_presets(result)
    for preset in result.presets:
        least = format_gib(least_budget_bytes(preset.planned.job, preset.planned.fixed))
        told = f"For {preset.name} no change of the settings is enough; it takes a card with {least} free."
        assert told in raised.value.fix


def test_the_longest_length_is_taken_apart() -> None:
    result = break_down(configure(), EIGHT_GIB, finds_longest=True)
    assert result.planned.chosen.fits
    assert result.config.max_length == result.planned.job.workload.longest_sequence != 1024
    assert result.longest_possible == 16384


def test_estimates_are_the_same_each_time() -> None:
    def text() -> str:
        breakdown = record_breakdown(break_down(configure(), EIGHT_GIB))
        return json.dumps([record_comparison(compare_presets(BUDGET)), breakdown])

    assert text() == text()


def test_a_record_has_its_unit_in_every_number_s_key() -> None:
    unitless = {"max_length", "lora_r", "effective_batch_size", "margin_share", "speed_up", "micro_batch_size"}
    unitless |= {"recomputed_blocks", "num_blocks", "longest_length_of_model"}
    units = ("_bytes", "_gb", "_s", "_tokens", "bytes", "tok_per_s")

    def check(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                check(item, name)
        elif isinstance(value, list):
            for item in value:
                check(item, key)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            assert key in unitless or key.endswith(units), key

    check(record_comparison(compare_presets(BUDGET)), "")
    check(record_breakdown(break_down(configure(), EIGHT_GIB, finds_longest=True)), "")


@pytest.mark.parametrize("name", sorted(BUILTIN_CONFIGS))
def test_deepseek_coder_needs_no_hub(name: str) -> None:
    model = find_shape(configure(model_name=name))
    assert model.shape.hidden_size == BUILTIN_CONFIGS[name]["hidden_size"]


def test_a_folder_of_the_same_name_comes_before_the_built_in_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "deepseek-ai/deepseek-coder-6.7b-base"
    (tmp_path / "deepseek-ai").mkdir()
    write_model(tmp_path / name, hidden_size=512)
    monkeypatch.chdir(tmp_path)
    assert find_shape(configure(model_name=name)).shape.hidden_size == 512


def test_models_that_can_t_be_estimated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="family gemma"):
        find_shape(configure(model_name=write_model(tmp_path / "gemma", model_type="gemma")))
    with pytest.raises(ModelError, match="no model folder"):
        find_shape(configure(model_name=str(tmp_path / "nowhere")))
    with pytest.raises(UnreachableHubError):
        find_shape(configure(model_name="somebody/something"))
    with pytest.raises(ModelError, match="20000 is more than the 16384 positions"):
        break_down(configure(max_length=20000), BUDGET)


def test_what_is_not_as_a_run_would_have_it_is_told(tmp_path: Path) -> None:
    config = configure(model_name=write_model(tmp_path / "model"), device="cpu", use_flash_attention=True)
    notices = break_down(config, Budget(find_card("T4"), "gpu")).notices
    assert [word in notice for word, notice in zip(("flash", "cpu"), notices, strict=True)] == [True] * 2
    with pytest.raises(ConfigError):
        break_down(config.model_copy(update={"precision": "bf16"}), Budget(find_card("T4"), "gpu"))
