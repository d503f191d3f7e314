"""Writing a merged model's files into a folder, in an order that leaves nothing loadable before all is proved.

config.json gets its name at last: without it no library takes the folder for a model.
"""

import json
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsft.core.errors import MergeError
from dsft.core.models.find_run import SUMMARY_FILE, find_tokenizer
from dsft.core.staging import flush_file
from dsft.core.versions import versions
from dsft.merge.arithmetic import MergedRows, UpdateShare, measure_share
from dsft.merge.config import OutputDtype
from dsft.merge.events import EventSink, Progress
from dsft.merge.folder import copy_tokenizer, write_json
from dsft.merge.generation_config import make_generation_config
from dsft.merge.model_card import render_merged_card
from dsft.merge.result import MergeResult
from dsft.merge.setup import MergeSetup
from dsft.merge.shards import Shard, write_shard
from dsft.merge.weights import is_finite
from dsft.merge.workers import count_workers, run_in_order

if TYPE_CHECKING:
    from dsft.merge.gguf.plan import GgufPlan

MODELFILE = "Modelfile"
CARD_FILE = "README.md"
UNPROVED_CONFIG = "config.json.unproved"
"""What config.json is called until the model has proved to be right."""


def write_weights(setup: MergeSetup, folder: Path, sink: EventSink) -> UpdateShare:
    """Write the merged weights as safetensors, and their index where there are several files.

    Returns:
        How much of the update is left after rounding.

    Raises:
        MergeError: A merged weight is NaN or infinite, or too large for the type.
    """
    share = UpdateShare()
    done, total = 0, setup.layout.num_bytes
    sink(Progress("merge", 0, total))
    flusher = ThreadPoolExecutor(1)
    try:
        flushes = []
        for shard in setup.layout.shards:
            with closing(_round_shard(setup, shard, share)) as pieces:
                for num_bytes in write_shard(folder, shard, setup.layout, pieces):
                    done += num_bytes
                    sink(Progress("merge", done, total))
            # The disk writes this file while the next one is made.
            flushes.append(flusher.submit(flush_file, folder / shard.file))
        for flush in flushes:
            flush.result()
    finally:
        flusher.shutdown(cancel_futures=True)
    setup.layout.write_index(folder)
    return share


def write_gguf_file(setup: MergeSetup, plan: "GgufPlan", folder: Path, sink: EventSink) -> str:
    """Write the GGUF file and the Ollama Modelfile.

    Returns:
        The GGUF file's name.
    """
    from dsft.merge.gguf.file import write_gguf
    from dsft.merge.ollama import write_modelfile, write_prompt_template

    name = f"model-{plan.kind}.gguf"
    done = 0

    def tell(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        sink(Progress("write gguf", done, plan.weight_bytes))

    tell(0)
    write_gguf(folder / name, plan, setup.source, tell)
    tokenizer = setup.tokenizer.tokenizer
    text = write_modelfile(
        name,
        None if setup.template is None else write_prompt_template(setup.template),
        [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in setup.stop_token_ids],
        setup.model_config.get("max_position_embeddings"),
    )
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return name


def write_configuration(setup: MergeSetup, folder: Path) -> None:
    """Write tokenizer, chat template, generation_config.json, and config.json under its first name."""
    source = find_tokenizer(setup.choice, setup.base.source)
    tokenizer_dir = setup.base.folder if source is setup.base.source else Path(source.location)
    copy_tokenizer(tokenizer_dir, folder, setup.chat_template)
    generation = make_generation_config(
        setup.base.read_json("generation_config.json"),
        setup.model_config,
        setup.stop_token_ids,
        setup.tokenizer.tokenizer.pad_token_id,
    )
    write_json(folder / "generation_config.json", generation)
    write_json(folder / UNPROVED_CONFIG, setup.model_config)


def reveal_configuration(folder: Path) -> None:
    """Give config.json its name."""
    (folder / UNPROVED_CONFIG).rename(folder / "config.json")


def write_card(setup: MergeSetup, result: MergeResult, folder: Path) -> None:
    """Write the model card."""
    path = setup.adapter_dir / SUMMARY_FILE
    training = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    note = ""
    if setup.chat_template is not None and setup.template is not None:
        note = f"The tokenizer's chat template writes the prompts of the run (`{setup.template.name}`)."
    card = render_merged_card(result, training=training, chat_template_note=note, versions=versions())
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _round_shard(setup: MergeSetup, shard: Shard, share: UpdateShare) -> Generator[torch.Tensor, None, None]:
    recipes = {recipe.tensor.name: recipe for recipe in setup.source.plan.recipes}
    works = (
        partial(_round, work, setup.config.dtype, tensor.name)
        for tensor in shard.tensors
        for work in setup.source.divide(recipes[tensor.name])
    )
    with closing(run_in_order(works, count_workers(setup.source.device.type))) as results:
        for rounded, rows_share in results:
            share.add(rows_share)
            yield rounded


def _round(make_rows: Callable[[], MergedRows], dtype: OutputDtype, name: str) -> tuple[torch.Tensor, UpdateShare]:
    rows = make_rows()
    rounded = rows.merged.to(getattr(torch, dtype))
    if not is_finite(rounded):
        raise MergeError(
            f"{name} of the merged model would hold NaN or infinite numbers in {dtype}.",
            "Take --dtype bfloat16, or an adapter or base without such weights.",
        )
    return rounded.cpu(), measure_share(rounded, rows)
