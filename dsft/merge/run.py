"""`dsft merge`: an adapter and its base model in, one model out that has been shown to compute the same."""

import dataclasses
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import dsft
from dsft.core.host_memory import peak_host_bytes
from dsft.core.models.find_run import MERGE_SUMMARY_FILE
from dsft.merge.config import FINER_TYPES, MergeConfig, OutputDtype
from dsft.merge.events import EventSink, Notice, Progress
from dsft.merge.result import UPDATE_KEPT_ENOUGH, MergeResult, Verification
from dsft.merge.setup import MergeSetup, prepared
from dsft.merge.target import written

if TYPE_CHECKING:
    from dsft.merge.arithmetic import UpdateShare


def run_merge(
    config: MergeConfig, sink: EventSink, on_complete: Callable[[Path], None] = lambda _target: None
) -> MergeResult:
    """Merge an adapter into its base model.

    The model is written beside its place, verified there, and moved in: it is complete or not there. Nothing is
    written before all is checked that names, shapes and settings tell.

    Args:
        config: What is asked for.
        sink: Receives notices and progress.
        on_complete: Receives the model's folder once it is whole and in its place, before a signal can take effect.

    Returns:
        What was done, and how exact it is.

    Raises:
        InputError: Adapter, base or output folder can't be used, or the adapter can't be merged exactly.
        MergeError: Adapter or result hold NaN or infinite numbers, or the merged model computes something else.
        WriteError: There is too little room, or files can't be written.
        NoGpuError: A GPU was demanded and there is none.
    """
    with (
        prepared(config, sink) as setup,
        written(
            setup.target,
            setup.adapter_dir,
            overwrite=config.overwrite,
            on_complete=lambda: on_complete(setup.target),
        ) as folder,
    ):
        return _write(setup, folder, sink)


def _write(setup: MergeSetup, folder: Path, sink: EventSink) -> MergeResult:
    from dsft.merge.folder import write_json
    from dsft.merge.write import (
        UNPROVED_CONFIG,
        reveal_configuration,
        write_card,
        write_configuration,
        write_gguf_file,
        write_weights,
    )

    started_s = time.perf_counter()
    share = write_weights(setup, folder, sink)
    merged_s = time.perf_counter()
    gguf = None if setup.gguf is None else write_gguf_file(setup, setup.gguf, folder, sink)
    gguf_s = time.perf_counter()
    write_configuration(setup, folder)
    _warn_of_loss(share, setup.config.dtype, sink)
    verification = _verify(setup, folder / UNPROVED_CONFIG, sink) if setup.config.is_verifying else None
    verified_s = time.perf_counter()
    result = MergeResult(
        adapter=setup.choice.name,
        base=setup.base.name.name,
        base_revision=setup.base.source.commit,
        base_fingerprint=setup.base.fingerprint,
        output=str(setup.target),
        template=setup.choice.template,
        dtype=setup.config.dtype,
        base_rounding=setup.config.base_rounding,
        num_parameters=sum(prod(tensor.shape) for tensor in setup.source.tensors),
        num_updated_tensors=sum(recipe.is_changed for recipe in setup.source.plan.recipes),
        update_kept=share.share,
        shards=tuple(shard.file for shard in setup.layout.shards),
        weight_bytes=setup.layout.num_bytes,
        gguf=gguf,
        gguf_type=setup.config.gguf,
        verification=verification,
        merge_s=merged_s - started_s,
        verify_s=None if verification is None else verified_s - gguf_s,
        gguf_s=None if gguf is None else gguf_s - merged_s,
        peak_host_memory_bytes=peak_host_bytes(),
        device=setup.source.device.type,
        dsft_version=dsft.__version__,
    )
    write_card(setup, result, folder)
    write_json(folder / MERGE_SUMMARY_FILE, dataclasses.asdict(result))
    reveal_configuration(folder)
    return result


def _warn_of_loss(share: "UpdateShare", dtype: OutputDtype, sink: EventSink) -> None:
    if share.share is not None and share.share < UPDATE_KEPT_ENOUGH:
        text = f"Rounding to {dtype} leaves {share.share * 100:.0f} % of the adapter's update. {FINER_TYPES[dtype]}"
        sink(Notice(text, "warning"))


def _verify(setup: MergeSetup, config_file: Path, sink: EventSink) -> Verification:
    from dsft.merge.prompts import make_prompts
    from dsft.merge.verify import Proof, verify

    done, total = 0, 2 * setup.run_bytes

    def tell(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        sink(Progress("verify", done, total))

    tell(0)
    rows = [row for indices in setup.structure.token_indices.values() for row in indices]
    prompts = make_prompts(setup.tokenizer.tokenizer, setup.template, rows, setup.source.plan.vocab_size)
    proof = Proof(setup.structure, setup.source, config_file, setup.config.dtype, prompts, tell)
    return verify(proof)
