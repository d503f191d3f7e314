"""What `dsft merge` is asked for; knows no model and no screen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsft.core.models.device import DeviceChoice

OutputDtype = Literal["bfloat16", "float16", "float32"]
BaseRounding = Literal["none", "nf4"]
GgufType = Literal["f16", "q8_0"]

FINER_TYPES: dict[OutputDtype, str] = {
    "bfloat16": "Take --dtype float16, which is finer, or float32, or use the adapter unmerged.",
    "float16": "Take --dtype float32, or use the adapter unmerged.",
    "float32": "Use the adapter unmerged.",
}
"""What to do where a type is too coarse."""


@dataclass(frozen=True)
class MergeConfig:
    """One merge.

    Attributes:
        adapter: Folder of a LoRA adapter; None is the newest finished run in `./trained_*`.
        output: Folder of the merged model; None is `merged_model` inside the adapter's folder.
        base: Base model instead of the recorded one: folder, hub id or `builtin:` name.
        dtype: Type the merged weights are rounded to, once.
        base_rounding: `nf4` merges into the NF4 round trip of the base that training computed with, `none` into the
            base as it is stored.
        device: Where the products are computed.
        is_verifying: Compare the logits of base and adapter with those of the merged model before it is moved in.
        gguf: Also write a GGUF file of this type and an Ollama Modelfile.
        overwrite: Replace a model that is in the output folder.
        force: Merge into a base of another name than the recorded one, or of other weights.
    """

    adapter: str | None = None
    output: Path | None = None
    base: str | None = None
    dtype: OutputDtype = "bfloat16"
    base_rounding: BaseRounding = "none"
    device: DeviceChoice = "cpu"
    is_verifying: bool = True
    gguf: GgufType | None = None
    overwrite: bool = False
    force: bool = False
