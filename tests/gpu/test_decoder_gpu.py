"""The decoder for CUDA: as exact as transformers' modules, whatever is asked of it, and its kernels one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config, Qwen3Config

from dsft.infer.decoding.loop import generate, generate_with_drafts
from dsft.infer.decoding.make import make_decoder
from dsft.infer.decoding.plain import PlainDecoder
from dsft.infer.sampling import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=None)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
}
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=8, rope_parameters=ROPE),
    "grouped heads, biases": LlamaConfig(**SHAPE, num_key_value_heads=2, attention_bias=True),
    "narrow keys": LlamaConfig(**SHAPE, num_key_value_heads=1),  # its NF4 scales reach over from layer to layer
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=32),
}


@dataclass
class Case:
    model: Any
    fast: Any
    plain: PlainDecoder


def load(folder: Path, dtype: torch.dtype, use_4bit: bool, rank: int) -> Any:
    settings: dict[str, Any] = {}
    if use_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": 0}, **settings).eval()
    if rank:
        torch.manual_seed(3)
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=LINEARS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config).eval()
    return model


def write(folder: Path, config: Any) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), CONFIGS[request.param])


@pytest.fixture(
    scope="module",
    params=[("bf16", False, 0), ("bf16", True, 0), ("bf16", False, 8), ("bf16", True, 8), ("fp16", True, 40)],
    ids=str,
)
def case(request: pytest.FixtureRequest, folder: Path) -> Iterator[Case]:
    dtype, use_4bit, rank = request.param
    model = load(folder, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], use_4bit, rank)
    notices: list[str] = []
    fast = make_decoder(model, notices.append)
    assert notices == [] and type(fast).__name__ == "CudaDecoder"
    yield Case(model, fast, PlainDecoder(model))
    del model, fast
    torch.cuda.empty_cache()


def make_exact(case: Case, folder: Path) -> Any:
    """Return the same model in float32, with the very weights that NF4 stands for."""
    import bitsandbytes.functional as bnb

    rank = 0
    base = case.model
    if hasattr(base, "peft_config"):
        rank = base.peft_config["default"].r
        base = base.get_base_model()
    exact = load(folder, torch.float32, False, rank)
    modules = dict(case.model.named_modules())
    with torch.no_grad():
        for name, module in exact.named_modules():
            source = modules[name]
            weight = getattr(source, "weight", None)
            if weight is None or not hasattr(module, "weight"):
                continue
            if type(source).__name__ == "Linear4bit":
                state = weight.quant_state
                scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
                data = weight.data.view(-1, 1)
                halves = torch.cat([data >> 4, data & 15], dim=1).long()
                values = state.code[halves].view(-1, 64) * scales.view(-1, 1)
                module.weight.copy_(values.view(module.weight.shape))
            else:
                module.weight.copy_(weight.float())
                if getattr(source, "bias", None) is not None:
                    module.bias.copy_(source.bias.float())
    return exact


def read_by_all_ways(decoder: Any, ids: list[int]) -> torch.Tensor:
    """Return logits after some tokens, read as a prompt, one by one, several at once and behind a shared beginning."""
    found = [decoder.start([ids[:100]], 300).clone()]
    for token in ids[100:110]:
        found.append(decoder.step(torch.tensor([token], device="cuda")).clone())
        decoder.know([token])
    found.append(decoder.extend(ids[110:117]).clone())
    decoder.rewind(3)
    found.append(decoder.extend(ids[114:117]).clone())
    found.append(decoder.start([ids[:300]], 50).clone())
    found.append(decoder.start([ids[:310]], 50).clone())
    return torch.cat(found)


def expected_places() -> list[int]:
    return [99, *range(100, 110), *range(110, 117), *range(114, 117), 299, 309]


def test_it_is_as_exact_as_transformers_modules(case: Case, folder: Path) -> None:
    torch.manual_seed(5)
    ids = torch.randint(0, 1000, (310,)).tolist()
    with torch.no_grad():
        exact = make_exact(case, folder)(input_ids=torch.tensor([ids], device="cuda")).logits[0]
    reference = exact[expected_places()]

    def error(decoder: Any) -> float:
        return float((read_by_all_ways(decoder, ids) - reference).norm() / reference.norm())

    ours, theirs = error(case.fast), error(case.plain)
    assert theirs < 0.1  # both follow the reference at all
    assert ours <= 1.1 * theirs, (ours, theirs)


def test_rows_are_read_as_each_alone_and_go_on_when_others_leave(case: Case) -> None:
    torch.manual_seed(6)
    ids = torch.randint(0, 1000, (500,)).tolist()
    prompts = [ids[:20], ids[30:90], ids[100:103], ids[200:390], ids[390:395]]
    next_ids = [1, 2, 3, 4, 5]

    def answer(decoder: Any) -> list[torch.Tensor]:
        found = [decoder.start(prompts, 50).clone(), decoder.step(torch.tensor(next_ids, device="cuda")).clone()]
        decoder.keep([3, 1])
        found.append(decoder.step(torch.tensor([7, 8], device="cuda")).clone())
        decoder.keep([1])
        found.append(decoder.extend([9, 10, 11]).clone())
        return found

    for ours, theirs in zip(answer(case.fast), answer(case.plain), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_the_base_alone_computes_without_the_adapter(case: Case) -> None:
    ids = list(range(40, 90))
    adapted = case.fast.start([ids], 20).clone()
    with case.fast.without_adapter():
        base = case.fast.start([ids], 20).clone()
    with case.plain.without_adapter():
        expected = case.plain.start([ids], 20)
    again = case.fast.start([ids], 20)
    assert (base - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(adapted, again)
    assert torch.equal(adapted, base) == (not hasattr(case.model, "peft_config"))


def test_drafts_give_the_tokens_of_the_model_itself(case: Case) -> None:
    """Where they part both tokens must be about equally likely: passes of other widths round differently."""
    prompt = [5, 6, 7, 8, 9, 10] * 6
    plain: list[int] = []
    generate(case.fast, [prompt], [40], GREEDY, lambda row, token: bool(plain.append(token)))
    drafted: list[int] = []
    generate_with_drafts(case.fast, prompt, 40, GREEDY, lambda token: bool(drafted.append(token)))
    assert len(plain) == len(drafted) == 40
    place = next((place for place in range(40) if plain[place] != drafted[place]), None)
    if place is not None:
        logits = case.plain.start([prompt + plain[:place]], 1)[0]
        gap = abs(float(logits[plain[place]] - logits[drafted[place]]))
        assert gap < 0.02 * float(logits.abs().max())


def test_a_conversation_reads_only_what_is_new(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    prompt = list(range(100, 180))
    generate(case.fast, [prompt], [30], GREEDY, lambda row, token: bool(told.append(token)))
    read: list[int] = []
    original = type(case.fast)._read

    def count(decoder: Any, stretches: Any) -> torch.Tensor:
        read.append(sum(last - first for _, first, last in stretches))
        return original(decoder, stretches)

    monkeypatch.setattr(type(case.fast), "_read", count)
    case.fast.start([prompt + told[:-1] + [3, 4, 5]], 2)
    assert read == [3]


def test_the_kernels_of_nf4_weights_one_by_one() -> None:
    import bitsandbytes.functional as bnb

    from dsft.infer.decoding.cuda.products import FusedLinear, Nf4Rows

    for num_rows, num_inputs in ((96, 192), (4096, 4096), (512, 11008), (70, 256), (128, 5120)):
        torch.manual_seed(0)
        weights = torch.randn(num_rows, num_inputs, dtype=torch.bfloat16, device="cuda") * 0.02
        packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True, blocksize=64)
        rows = Nf4Rows(
            packed.view(-1),
            state.absmax,
            state.state2.code,
            state.state2.absmax,
            torch.full_like(state.state2.absmax, float(state.offset)),
            state.code,
            num_rows,
        )
        linear = FusedLinear([rows], None, None, num_inputs, torch.bfloat16)
        written = linear._write_out([rows])
        assert torch.equal(written, bnb.dequantize_4bit(packed, state))
        for num_tokens in (1, 2, 7, 16, 33, 64):
            states = torch.randn(num_tokens, num_inputs, device="cuda")
            states[:, 3] *= 1000  # one number that dwarfs the others, as models have
            states = states.to(torch.bfloat16)
            product = linear.multiply(states, False).parts.sum(0)
            reference = states.double() @ written.double().T
            assert (product - reference).norm() < 4e-3 * reference.norm()
            tail = states.double()
            tail[:, 3] = 0
            error = product - reference
            assert error.norm() < 4e-3 * (tail @ written.double().T).norm() + 2**-9 * reference.norm()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "changes with the text"),
        ({"head_dim": 48}, "its heads have 48 numbers"),
    ],
)
def test_what_it_does_not_run_is_told_and_run_by_transformers(settings: dict[str, Any], reason: str) -> None:
    config = LlamaConfig(**(SHAPE | {"num_key_value_heads": 8} | settings))
    model = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16).eval()
    notices: list[str] = []
    assert isinstance(make_decoder(model, notices.append), PlainDecoder)
    assert len(notices) == 1 and reason in notices[0]


def test_an_adapter_on_the_head_and_dora_are_left_to_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["llama"])
    for settings in ({"target_modules": [*LINEARS, "lm_head"]}, {"target_modules": LINEARS, "use_dora": True}):
        model = load(folder, torch.bfloat16, False, 0)
        adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
        notices: list[str] = []
        assert isinstance(make_decoder(adapted, notices.append), PlainDecoder)
        assert "adapter" in notices[0]


def test_memory_is_given_back_after_an_error(case: Case) -> None:
    def fail(row: int, token: int) -> bool:
        raise KeyboardInterrupt

    def answer_shortly() -> int:
        told: list[int] = []
        generate(case.fast, [[1, 2, 3]], [5], GREEDY, lambda row, token: bool(told.append(token)))
        return len(told)

    answer_shortly()  # libraries make their workspaces
    case.fast.reset()
    before = torch.cuda.memory_allocated()
    with pytest.raises(KeyboardInterrupt):
        generate(case.fast, [[1, 2, 3]] * 8, [2000] * 8, GREEDY, fail)
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert answer_shortly() == 5
