"""Pretrain the embedded demo model (`presets/tiny/model`): a small DeepSeek-Coder-shaped Llama on Python's own sources.

Only the base model is made here; fine-tuning it is the job of `dsft train --preset tiny`.

    python scripts/pretrain_tiny.py --out presets/tiny/model --minutes 8
"""

import argparse
import math
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from tiny_corpus import cut_windows, encode_documents, read_sources
from tiny_model import (
    MAX_POSITIONS,
    build_model,
    replace_folder,
    stop,
    train_tokenizer,
    write_facts,
    write_model,
)
from tokenizers import Tokenizer
from torch import nn

NUM_VALIDATIONS = 20
MEASURE_ROWS = 64
WARMUP_SHARE = 0.02
FINAL_LEARNING_RATE_SHARE = 0.01
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0

DEVICE_DEFAULTS: dict[str, dict[str, float]] = {
    # A CPU sees the corpus about once and gains from many small steps; a GPU passes over it many times, hence dropout.
    "cpu": {"window": 256, "batch_tokens": 2048, "learning_rate": 4e-3, "dropout": 0.0, "validation_tokens": 32_768},
    "cuda": {
        "window": 512,
        "batch_tokens": 65_536,
        "learning_rate": 4e-3,
        "dropout": 0.1,
        "validation_tokens": 2_000_000,
    },
}


@dataclass(frozen=True)
class Settings:
    """What one run does; times in seconds, dropout as a share of the values set to zero."""

    out: Path
    sources: Path
    device: str
    budget_s: float
    num_steps: int | None
    window: int
    batch_tokens: int
    validation_tokens: int
    learning_rate: float
    dropout: float
    use_compile: bool
    seed: int


@dataclass
class Outcome:
    """What the training loop leaves: the best weights, and how they came about up to the last validation."""

    best_loss: float = math.inf
    best_step: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    num_steps: int = 0
    num_measured_steps: int = 0
    training_s: float = 0.0
    is_compiled: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)


def parse_settings(arguments: list[str]) -> Settings:
    """Read the command line; what is not given follows the device.

    Args:
        arguments: Command line without the program's name.

    Returns:
        The settings of the run.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; replaced as a whole")
    parser.add_argument(
        "--sources", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of .py files"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=8.0, help="time of the training loop (default 8)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of a time")
    parser.add_argument("--window", type=int, help="tokens of one training sequence")
    parser.add_argument("--batch-tokens", type=int, help="tokens of one optimizer step")
    parser.add_argument("--validation-tokens", type=int, help="at most this many tokens give the validation loss")
    parser.add_argument("--learning-rate", type=float, help="peak")
    parser.add_argument("--dropout", type=float, help="on what attention and MLP add to the residual stream")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    defaults = DEVICE_DEFAULTS[device]

    def pick(name: str) -> float:
        value = getattr(given, name)
        return defaults[name] if value is None else value

    settings = Settings(
        out=given.out,
        sources=given.sources,
        device=device,
        budget_s=given.minutes * 60,
        num_steps=given.steps,
        window=int(pick("window")),
        batch_tokens=int(pick("batch_tokens")),
        validation_tokens=int(pick("validation_tokens")),
        learning_rate=pick("learning_rate"),
        dropout=pick("dropout"),
        use_compile=device == "cuda" if given.compile is None else given.compile,
        seed=given.seed,
    )
    if not 0 < settings.window <= min(MAX_POSITIONS, settings.batch_tokens):
        parser.error(f"--window {settings.window}: at least 1, at most --batch-tokens and {MAX_POSITIONS}")
    if not 0 <= settings.dropout < 1:
        parser.error(f"--dropout {settings.dropout}: at least 0, below 1")
    if settings.budget_s <= 0 or (settings.num_steps is not None and settings.num_steps < 1):
        parser.error("--minutes and --steps must be above 0")
    return settings


def add_dropout(model: Any, share: float) -> None:
    """Drop a share of what each attention and MLP adds to the residual stream, in training mode only.

    Llama has no such dropout; as hooks it leaves no trace in the saved model.
    """

    def drop(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, module.training)

    if share == 0:
        return
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def make_loss(model: Any, window: int, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the function from a batch of token ids to its mean loss.

    It calls the layers itself: without a mask tensor, attention takes the causal flash kernel, compiled or not.

    Args:
        model: A LlamaForCausalLM.
        window: Tokens that are predicted in each row.
        device: "cpu" (float32) or "cuda" (bfloat16 autocast).

    Returns:
        A function of token ids, int64, shape [rows, window + 1].
    """
    base = model.model
    with torch.no_grad():
        positions = torch.arange(window, device=device)[None]
        rotary = base.rotary_emb(torch.zeros(1, device=device), positions)  # cos and sin, each [1, window, head_dim]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            hidden = base.embed_tokens(batch[:, :-1])  # [rows, window, hidden]
            for layer in base.layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            logits = model.lm_head(base.norm(hidden))  # [rows, window, vocab]
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return loss_of


def autocast(device: str) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast on CUDA; a CPU computes in float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext()


def compile_or_keep(
    loss_of: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """Compile the loss and try it once, forward and backward; without a working compiler go on uncompiled and say so.

    Args:
        loss_of: As made by `make_loss`.
        batch: Token ids of the shape that training will use.

    Returns:
        The function to train with, and whether it is compiled.
    """
    try:
        compiled = torch.compile(loss_of)
        compiled(batch).backward()
    except Exception as error:  # any compiler failure: compiling is about speed alone
        print(f"torch.compile failed, going on without it: {type(error).__name__}: {str(error)[:500]}", flush=True)
        torch._dynamo.reset()
        return loss_of, False
    return compiled, True


@torch.no_grad()
def measure_loss(model: Any, windows: torch.Tensor, device: str) -> float:
    """Measure the mean loss per token over rows of token ids, int64, shape [rows, window + 1]."""
    model.eval()
    loss_of = make_loss(model, windows.shape[1] - 1, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows in windows.split(MEASURE_ROWS):
        total += loss_of(rows).double() * len(rows)
    model.train()
    return float(total) / len(windows)


def learning_rate_share(progress: float) -> float:
    """Return the share of the peak learning rate at a progress of 0 to 1: linear warm-up, then cosine."""
    if progress < WARMUP_SHARE:
        return max(progress, 1e-4) / WARMUP_SHARE
    angle = math.pi * min(1.0, (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * (1 + math.cos(angle)) / 2


def make_optimizer(model: Any, learning_rate: float, device: str) -> torch.optim.AdamW:
    """Make AdamW that decays matrices and leaves the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=device == "cuda")


def train(model: Any, tokens: torch.Tensor, windows: torch.Tensor, settings: Settings) -> Outcome:
    """Train on random windows of the stream until the steps or the time are used up.

    Args:
        model: The untrained model, on the device.
        tokens: Training stream, int16, shape [num_tokens], on the device.
        windows: Validation rows, int64, shape [rows, window + 1], on the device.
        settings: The run's settings.

    Returns:
        The best weights by validation loss, and the curve.
    """
    outcome = Outcome()
    num_rows = settings.batch_tokens // settings.window
    offsets = torch.arange(settings.window + 1, device=settings.device)

    def draw_batch() -> torch.Tensor:
        starts = torch.randint(len(tokens) - settings.window, (num_rows, 1), device=settings.device)
        return tokens[starts + offsets].long()

    model.train()
    optimizer = make_optimizer(model, settings.learning_rate, settings.device)
    loss_of = make_loss(model, settings.window, settings.device)
    if settings.use_compile:
        loss_of, outcome.is_compiled = compile_or_keep(loss_of, draw_batch())
        optimizer.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss_sum, next_validation = torch.zeros((), device=settings.device), 1 / NUM_VALIDATIONS
    while True:
        progress = (time.perf_counter() - started) / settings.budget_s
        if settings.num_steps is not None:
            progress = outcome.num_steps / settings.num_steps
        if progress >= next_validation and outcome.num_steps > outcome.num_measured_steps:
            next_validation = (math.floor(progress * NUM_VALIDATIONS) + 1) / NUM_VALIDATIONS
            training_loss = float(loss_sum) / (outcome.num_steps - outcome.num_measured_steps)
            outcome.training_s = time.perf_counter() - started
            record_validation(outcome, model, training_loss, measure_loss(model, windows, settings.device))
            num_seen = outcome.num_steps * num_rows * settings.window
            print(
                f"{min(progress, 1):4.0%}  step {outcome.num_steps:6d}  {num_seen / 1e6:8.2f} M tokens  "
                f"{num_seen / outcome.training_s:9.0f} tok/s  loss {training_loss:.4f}  "
                f"validation {outcome.curve[-1]['validation_loss']:.4f}",
                flush=True,
            )
            loss_sum.zero_()
        if progress >= 1 and outcome.curve:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_share(progress)
        loss = loss_of(draw_batch())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.detach()
        outcome.num_steps += 1
    return outcome


def record_validation(outcome: Outcome, model: Any, training_loss: float, validation_loss: float) -> None:
    """Add a point to the curve, and keep a copy of the weights if they are the best so far."""
    if not math.isfinite(validation_loss):
        stop(f"the validation loss is {validation_loss} at step {outcome.num_steps}; try a lower --learning-rate.")
    outcome.num_measured_steps = outcome.num_steps
    point = {
        "step": outcome.num_steps,
        "training_s": round(outcome.training_s, 1),
        "training_loss": round(training_loss, 4),
        "validation_loss": round(validation_loss, 4),
    }
    outcome.curve.append(point)
    if validation_loss < outcome.best_loss:
        outcome.best_loss, outcome.best_step = validation_loss, outcome.num_steps
        outcome.best_weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def main(arguments: list[str]) -> None:
    """Read the sources, train tokenizer and model, write the folder."""
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as transformers_version

    settings = parse_settings(arguments)
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    texts, held_out_texts = read_sources(settings.sources)
    tokenizer = train_tokenizer(texts)
    tokens = encode_documents(tokenizer, texts).to(settings.device)
    held_out_tokens = encode_documents(tokenizer, held_out_texts).to(settings.device)
    print(
        f"{len(texts)} files, {sum(map(len, texts)):,} characters, {len(tokens):,} tokens to train on; "
        f"{len(held_out_texts)} files, {len(held_out_tokens):,} tokens held out; {time.perf_counter() - started:.1f} s",
        flush=True,
    )
    if min(len(tokens), len(held_out_tokens)) <= settings.window + 1:
        stop(f"--window {settings.window} is longer than one part of the sources.")
    windows = cut_windows(held_out_tokens, settings.window, settings.validation_tokens)
    model = build_model(settings.device)
    add_dropout(model, settings.dropout)
    outcome = train(model, tokens, windows, settings)

    model.load_state_dict(outcome.best_weights)
    partial = settings.out.with_name(settings.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write_model(partial, model, tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).to(settings.device)
    is_cuda = settings.device == "cuda"
    facts = {
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "validation_loss": round(measure_loss(saved, windows, settings.device), 4),
        "validation_loss_before_rounding_to_bf16": round(outcome.best_loss, 4),
        "best_step": outcome.best_step,
        "steps": outcome.num_steps,
        "tokens_seen": outcome.num_steps * (settings.batch_tokens // settings.window) * settings.window,
        "training_seconds": round(outcome.training_s, 1),
        "training_files": len(texts),
        "training_tokens": len(tokens),
        "held_out_files": len(held_out_texts),
        "held_out_tokens": len(held_out_tokens),
        "validation_tokens": windows.shape[0] * settings.window,
        "window": settings.window,
        "batch_tokens": settings.batch_tokens,
        "learning_rate": settings.learning_rate,
        "weight_decay": WEIGHT_DECAY,
        "dropout": settings.dropout,
        "seed": settings.seed,
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "compiled": outcome.is_compiled,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": transformers_version,
    }
    write_facts(partial, facts, outcome.curve)
    replace_folder(partial, settings.out)
    size_bytes = sum(path.stat().st_size for path in settings.out.iterdir())
    print(f"validation loss {facts['validation_loss']} as saved; {size_bytes:,} bytes in {settings.out}", flush=True)
    print(continue_text(saved, tokenizer, 'class Stack:\n    """A stack."""\n\n    def __init__(self'), flush=True)


def continue_text(model: Any, tokenizer: Tokenizer, prompt: str) -> str:
    """Continue a prompt greedily, for a look at what was learned."""
    prompt_ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    token_ids = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=80, do_sample=False
    )
    return tokenizer.decode(token_ids[0].tolist())


if __name__ == "__main__":
    main(sys.argv[1:])
