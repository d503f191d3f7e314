"""What a merge did; the object that `--json` prints and merge_summary.json holds."""

from dataclasses import dataclass

from dsft.merge.config import BaseRounding, GgufType, OutputDtype

UPDATE_KEPT_ENOUGH = 0.9
"""Share of the update below which rounding is worth a warning."""


@dataclass(frozen=True)
class Verification:
    """Logits of base and adapter (as PEFT computes them, in float32) against those of the merged model.

    Attributes:
        num_tokens: Positions compared.
        max_difference: Greatest difference of a logit.
        mean_difference: Mean difference of a logit.
        mean_kl: Mean Kullback-Leibler divergence of the merged model's next-token distribution, in nats.
        max_kl: Greatest one.
        top_token_agreement: Share of positions with the same likeliest token, 0 to 1.
        rounding_mean_difference: Mean difference that PEFT's own merge, rounded to the same type, has: what the type
            explains.
        rounding_max_difference: Greatest difference that it has.
        excess_mean_difference: Mean difference between the merged model and that merge: what the type doesn't explain.
        excess_max_difference: Greatest one.
    """

    num_tokens: int
    max_difference: float
    mean_difference: float
    mean_kl: float
    max_kl: float
    top_token_agreement: float
    rounding_mean_difference: float
    rounding_max_difference: float
    excess_mean_difference: float
    excess_max_difference: float


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what it took.

    Attributes:
        adapter: The adapter as named or found.
        base: Name of the base model.
        base_revision: Its hub commit; None for a local folder.
        base_fingerprint: What its weights are known by.
        output: Folder of the merged model, as named.
        template: Prompt template of the run; None where none is recorded.
        dtype: Type of the merged weights.
        base_rounding: Which base the update was added to.
        num_parameters: Weights of the merged model; tied ones once.
        num_updated_tensors: Tensors that the adapter changes.
        update_kept: Share of the update that is left after rounding: the projection of (merged - base) on the exact
            update, over all low-rank updated weights. 1 is all of it; None where no low-rank update is there.
        shards: Names of the weight files.
        weight_bytes: Bytes of all weight files.
        gguf: Name of the GGUF file; None where none was asked for.
        gguf_type: Its type.
        verification: None where it was not asked for.
        merge_s: Seconds for reading, merging and writing.
        verify_s: Seconds for the verification.
        gguf_s: Seconds for the GGUF file.
        peak_host_memory_bytes: Most memory the process had resident, mapped pages included.
        device: "cuda" or "cpu".
        dsft_version: The version that merged.
    """

    adapter: str
    base: str
    base_revision: str | None
    base_fingerprint: str
    output: str
    template: str | None
    dtype: OutputDtype
    base_rounding: BaseRounding
    num_parameters: int
    num_updated_tensors: int
    update_kept: float | None
    shards: tuple[str, ...]
    weight_bytes: int
    gguf: str | None
    gguf_type: GgufType | None
    verification: Verification | None
    merge_s: float
    verify_s: float | None
    gguf_s: float | None
    peak_host_memory_bytes: int
    device: str
    dsft_version: str
