"""Every family that dsft trains: samples laid flat give the logits that each has alone, by transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.core.errors import ModelError
from dsft.core.models.attention import PER_SAMPLE, register_attention
from dsft.core.models.load import TRAINABLE_FAMILIES, check_trainable
from dsft.core.models.source import ModelSource
from dsft.train.batches import flatten
from tests.unit.train.random_samples import VOCABULARY, make_samples

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(family: str, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("family", sorted(TRAINABLE_FAMILIES))
def test_flat_samples_have_the_logits_they_have_alone(family: str) -> None:
    data = make_samples(3)
    samples = [data[index] for index in range(3)]
    batch = flatten(samples)
    flat, plain = make_model(family, PER_SAMPLE), make_model(family, "eager")
    with torch.no_grad():
        together = flat(
            input_ids=batch.input_ids, position_ids=batch.position_ids, cu_seq_lens_q=batch.sample_bounds
        ).logits[0]
        alone = [plain(input_ids=torch.from_numpy(sample.token_ids)[None]).logits[0] for sample in samples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def check(max_length: int, **config: Any) -> None:
    check_trainable(ModelSource("m", "m", None, None, {"model_type": "phi3"} | config), max_length)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rotation_that_the_longest_sample_chooses_for_all_is_refused(key: str) -> None:
    rope = {"rope_type" if key == "rope_parameters" else "type": "longrope"}
    check(4096, **{key: rope, "original_max_position_embeddings": 4096})
    check(4096, **{key: rope | {"original_max_position_embeddings": 4096}})
    with pytest.raises(ModelError, match="beyond 4096 tokens"):
        check(4097, **{key: rope, "original_max_position_embeddings": 4096})


def test_weights_of_another_shape_than_their_config_are_refused(tmp_path: Path) -> None:
    import json

    from dsft.core.models.attention import AttentionKernel
    from dsft.core.models.device import Device
    from dsft.core.models.load import load_quantized
    from dsft.core.models.source import find_model

    make_model("llama", "eager").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_quantized(find_model(str(tmp_path)), Device("cpu", "CPU"), "fp32", AttentionKernel(PER_SAMPLE, ""))
