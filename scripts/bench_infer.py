"""Measure generation on a GPU beside transformers' `generate`, same weights, same process.

    python scripts/bench_infer.py MODEL --adapter-rank 64 --out docs/benchmarks/infer-6.7b.json

For each of NF4 and 16 bits: one stream and a batch of 32, with and without an unmerged adapter, the time to the first
token of a 1,000-token prompt, and what a pass over eight tokens takes, as a draft of seven does. Prompts are random
tokens; nothing ends early. Times are medians of several repeats, each synchronized.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig

import dsft
from dsft.core.models.device import resolve_device
from dsft.core.models.source import find_model
from dsft.infer.decoding.loop import generate
from dsft.infer.decoding.make import make_decoder
from dsft.infer.load_model import Placement, load_model
from dsft.infer.sampling import Sampling

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=None)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure_read_bandwidth() -> float:
    """Return the bytes a second at which the card reads 16-bit weights in a product with one vector."""
    weights = torch.randn(32768, 16384, dtype=torch.bfloat16, device="cuda")
    vector = torch.randn(1, 16384, dtype=torch.bfloat16, device="cuda")
    seconds = time_on_device(lambda: torch.nn.functional.linear(vector, weights), 20)
    return weights.nbytes / seconds


def time_on_device(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of some work, synchronized."""
    work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


class Ours:
    """dsft's decoder."""

    def __init__(self, model: Any) -> None:
        self.notices: list[str] = []
        self.decoder = make_decoder(model, self.notices.append)

    def run(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token and from the first to the last one."""
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        told: list[float] = []

        def receive(row: int, token_id: int) -> bool:
            if row == 0:
                told.append(time.perf_counter())
            return False

        generate(self.decoder, prompts, [num_tokens] * len(prompts), GREEDY, receive)
        return told[0] - started_s, told[-1] - told[0]


class Theirs:
    """transformers' `generate`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.generation_config = GenerationConfig()

    def run(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token and from the first to the last one, by two runs."""
        first_s = self._time(prompts, 1)
        return first_s, self._time(prompts, num_tokens) - first_s

    def _time(self, prompts: list[list[int]], num_tokens: int) -> float:
        ids = torch.tensor(prompts, device="cuda")
        config = GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=1
        )
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s


def measure(side: Ours | Theirs, batch: int, prompt_tokens: int, num_tokens: int, repeats: int) -> dict[str, float]:
    """Return seconds and rates of one setting."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[list[int]]:
        # Others each time: what a prompt has in common with the one before it is not read again.
        ids: list[list[int]] = torch.randint(10, 30000, (batch, prompt_tokens), generator=generator).tolist()
        return ids

    side.run(draw(), num_tokens)
    runs = [side.run(draw(), num_tokens) for _ in range(repeats)]
    after_s = statistics.median(after for _, after in runs)
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": num_tokens,
        "time_to_first_token_s": statistics.median(first for first, _ in runs),
        "tok_per_s": batch * (num_tokens - 1) / after_s if num_tokens > 1 else 0.0,
        "slowest_tok_per_s": batch * (num_tokens - 1) / max(after for _, after in runs) if num_tokens > 1 else 0.0,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
    }


def add_adapter(model: Any, rank: int) -> PeftModel:
    """Put a random adapter on all linear layers of the blocks."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(model, config).eval()


def time_passes(ours: Ours) -> dict[str, float]:
    """Return the seconds of passes over one to eight tokens of one text behind 512 others."""
    prompt = list(range(100, 612))
    found = {}
    for num_tokens in (1, 2, 4, 8):
        ours.decoder.start([prompt], 256)

        def work(num_tokens: int = num_tokens) -> None:
            ours.decoder.extend([7] * num_tokens)
            ours.decoder.rewind(num_tokens)

        found[str(num_tokens)] = time_on_device(work, 30)
    return found


def bench(model_dir: str, use_4bit: bool, rank: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Measure one kind of weights."""
    source = find_model(model_dir)
    dtype = "bfloat16"
    started_s = time.perf_counter()
    model: Any = load_model(source, None, Placement(resolve_device("cuda"), dtype, use_4bit))
    found: dict[str, Any] = {"load_s": time.perf_counter() - started_s}
    found["weight_bytes"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    theirs = Theirs(model)
    slow_tokens = max(16, num_tokens // 8)
    found["transformers"] = [
        measure(theirs, 1, 128, slow_tokens, repeats),
        measure(theirs, 32, 128, slow_tokens, repeats),
        measure(theirs, 1, 1000, 2, repeats),
    ]
    torch.cuda.reset_peak_memory_stats()
    started_s = time.perf_counter()
    ours = Ours(model)
    ours.run([[5] * 100], 4)
    found["ready_s"] = time.perf_counter() - started_s
    found["notices"] = ours.notices
    found["dsft"] = [
        measure(ours, 1, 128, num_tokens, repeats),
        measure(ours, 32, 128, num_tokens, repeats),
        measure(ours, 1, 1000, 2, repeats),
        measure(ours, 1, 8000, 64, repeats),
    ]
    found["pass_s"] = time_passes(ours)
    del ours
    gc.collect()
    torch.cuda.empty_cache()
    adapted = add_adapter(model, rank)
    theirs = Theirs(adapted)
    found["transformers_adapter"] = [measure(theirs, 1, 128, slow_tokens, repeats)]
    ours = Ours(adapted)
    found["dsft_adapter"] = [
        measure(ours, 1, 128, num_tokens, repeats),
        measure(ours, 32, 128, num_tokens, repeats),
        measure(ours, 1, 1000, 2, repeats),
    ]
    found["pass_s_adapter"] = time_passes(ours)
    found["notices"] += ours.notices
    return found


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter-rank", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=["nf4", "bf16"], default=["nf4", "bf16"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"dsft": dsft.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
        "model": Path(given.model).name,
        "adapter_rank": given.adapter_rank,
        "read_bytes_per_s": measure_read_bandwidth(),
    }
    torch.cuda.empty_cache()
    for kind in given.kinds:
        report[kind] = bench(given.model, kind == "nf4", given.adapter_rank, given.new_tokens, given.repeats)
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
