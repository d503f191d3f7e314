"""A merge's result with plausible figures, for tests of what is made of it."""

from typing import Any

from dsft.core.units import GIB
from dsft.merge.result import MergeResult, Verification


def make_merge_result(**changes: Any) -> MergeResult:
    """Return the result of a merge of the default settings into the 6.7B base, with some fields changed."""
    fields: dict[str, Any] = {
        "adapter": "trained_deepseek",
        "base": "deepseek-ai/deepseek-coder-6.7b-base",
        "base_revision": "0123abc",
        "base_fingerprint": "f" * 16,
        "output": "trained_deepseek/merged_model",
        "template": "instruction",
        "dtype": "bfloat16",
        "base_rounding": "none",
        "num_parameters": 6_740_512_768,
        "num_updated_tensors": 224,
        "update_kept": 0.9987,
        "shards": ("model-00001-of-00003.safetensors",) * 3,
        "weight_bytes": 13_481_025_536,
        "gguf": None,
        "gguf_type": None,
        "verification": make_verification(),
        "merge_s": 15.0,
        "verify_s": 8.0,
        "gguf_s": None,
        "peak_host_memory_bytes": round(1.6 * GIB),
        "device": "cpu",
        "dsft_version": "0.1.0",
    }
    return MergeResult(**(fields | changes))


def make_verification(**changes: Any) -> Verification:
    """Return the figures of a verification that passes, with some changed."""
    fields: dict[str, Any] = {
        "num_tokens": 512,
        "max_difference": 0.0312,
        "mean_difference": 0.00211,
        "mean_kl": 1.25e-6,
        "max_kl": 3.5e-5,
        "top_token_agreement": 511 / 512,
        "rounding_mean_difference": 0.00209,
        "rounding_max_difference": 0.0309,
        "excess_mean_difference": 0.0000123,
        "excess_max_difference": 0.00031,
    }
    return Verification(**(fields | changes))
