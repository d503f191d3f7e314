"""Quantized copies: the model they give is the one that quantizing gives, and no damage or trouble stops a start."""

import errno
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsft.core.errors import ModelError
from dsft.core.models import nf4_cache, nf4_file, nf4_key, nf4_model
from dsft.core.models.attention import PER_SAMPLE, AttentionKernel, register_attention
from dsft.core.models.device import Device
from dsft.core.models.nf4_key import make_copy_key
from dsft.core.models.nf4_model import QUANTIZATION, load_nf4_model
from dsft.core.models.source import ModelSource, find_model
from dsft.core.paths import nf4_cache_dir
from tests.scripted_models import write_random_model

CPU = Device("cpu", "CPU")
LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}}


@pytest.fixture(autouse=True)
def _small_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cache, "LEAST_COPY_BYTES", 0)
    monkeypatch.setattr(nf4_cache, "SPARE_BYTES", 0)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model", **LINEAR_ROPE)


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Any, list[str]]:
    notices: list[str] = []
    return load_nf4_model(find_model(str(folder)), CPU, dtype, options, notices.append), notices


def copies() -> list[Path]:
    return sorted(nf4_cache_dir().iterdir()) if nf4_cache_dir().is_dir() else []


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("weights were quantized")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)


def assert_same(one: Any, other: Any) -> None:
    """Everything that a user of the models could see is the same."""
    assert type(one) is type(other)
    for read in (
        lambda model: list(model.state_dict().items()),
        lambda model: list(model.named_parameters(remove_duplicate=False)),
        lambda model: list(model.named_buffers(remove_duplicate=False)),
    ):
        for (name, expected), (other_name, found) in zip(read(one), read(other), strict=True):
            assert name == other_name
            assert (type(expected), expected.dtype, expected.device) == (type(found), found.dtype, found.device), name
            assert expected.requires_grad == found.requires_grad, name
            assert torch.equal(expected, found), name
            assert expected.__dict__.keys() == found.__dict__.keys(), name
    for (name, expected), (_, found) in zip(one.named_modules(), other.named_modules(), strict=True):
        assert type(expected) is type(found), name
        assert expected.training == found.training is False
        assert vars(expected).keys() == vars(found).keys(), name
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_device_map", "dtype"):
        assert getattr(one, name, None) == getattr(other, name, None)
    assert one.hf_quantizer.pre_quantized == other.hf_quantizer.pre_quantized
    assert one.hf_quantizer.quantization_config.to_dict() == other.hf_quantizer.quantization_config.to_dict()
    assert one.config.to_dict() == other.config.to_dict()
    assert one.config._attn_implementation == other.config._attn_implementation
    assert one.config.name_or_path == other.config.name_or_path
    assert one.generation_config == other.generation_config
    tied = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (one, other)]
    assert tied[0] == tied[1] == one.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_copy_gives_the_model_that_quantizing_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_tied: bool
) -> None:
    folder = write_random_model(tmp_path / "model", tie_word_embeddings=is_tied, attention_bias=True, **LINEAR_ROPE)
    register_attention()
    options = {"attn_implementation": PER_SAMPLE, "attention_dropout": 0.0}
    fresh, notices = load(folder, dtype, **options)
    [copy] = copies()
    assert notices == [f"Kept a quantized copy (0.0 GiB) in {nf4_cache_dir()}; it is safe to delete."]
    with monkeypatch.context() as patch:
        forbid_quantizing(patch)
        read, notices = load(folder, dtype, **options)
    assert notices == []
    assert_same(fresh, read)
    # And both are what transformers gives, which never heard of a copy.
    assert_same(load_by_transformers(folder, dtype, options), read)
    tensors = load_file(copy)
    assert sum(name.endswith("q_proj.weight") for name in tensors) == 2
    assert not any("inv_freq" in name for name in tensors)


def load_by_transformers(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**QUANTIZATION, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map={"": torch.device("cpu")}, **options
    )


def test_a_checkpoint_with_names_that_transformers_changes_is_the_same_from_a_copy(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write_random_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    headless = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    fresh, _ = load(folder)
    assert len(copies()) == 1
    assert_same(fresh, load(folder)[0])


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "starcoder2"])
def test_other_families_are_the_same_from_a_copy(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"num_key_value_heads": 2} if family != "gpt2" else {}
    config = AutoConfig.for_model(family, vocab_size=100, **sizes, **extra)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    fresh, _ = load(tmp_path / "model")
    read, notices = load(tmp_path / "model")
    assert notices == []
    assert_same(fresh, read)
    assert len(copies()) == 1
    used = nf4_model._describe_conversions(fresh._weight_conversions)
    assert nf4_model._describe_conversions(read._weight_conversions) == used
    assert bool(used) == (family == "mixtral")  # its experts are fused while it loads
    token_ids = torch.tensor([[5, 17, 42]])
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=token_ids).logits, read(input_ids=token_ids).logits)


def test_a_model_that_was_read_can_be_saved_and_loaded_again(model_dir: Path, tmp_path: Path) -> None:
    fresh, _ = load(model_dir)
    read, _ = load(model_dir)
    for name, model in (("fresh", fresh), ("read", read)):
        model.save_pretrained(tmp_path / name)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("fresh", "read"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def train(folder: Path) -> list[float]:
    from dsft.core.models.load import LoraSettings, attach_lora, load_quantized

    base = load_quantized(find_model(str(folder)), CPU, "fp32", AttentionKernel(PER_SAMPLE, ""))
    model = attach_lora(base, LoraSettings(4, 8, 0.1, seed=0)).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    token_ids = torch.arange(1, 33)[None]
    bounds = torch.tensor([0, 32], dtype=torch.int32)
    for _ in range(4):
        positions = torch.arange(32)[None]
        logits = model(input_ids=token_ids, position_ids=positions, cu_seq_lens_q=bounds).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], token_ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_from_a_copy_has_the_same_losses(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = train(model_dir)
    assert losses[-1] < losses[0]
    forbid_quantizing(monkeypatch)
    assert train(model_dir) == losses


def test_generation_from_a_copy_is_the_same_and_shares_it_with_training(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsft.infer.load_model import Placement, load_model

    source, notices = find_model(str(model_dir)), list[str]()
    prompt = torch.tensor([[5, 17, 42, 99]])

    def answer() -> list[int]:
        model = load_model(source, None, Placement(CPU, "float32", use_4bit=True), notices.append)
        return model.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()

    first = answer()
    assert len(notices) == 1
    forbid_quantizing(monkeypatch)
    assert answer() == first
    assert len(train(model_dir)) == 4
    assert len(copies()) == len(notices) == 1


def key_of(source: ModelSource, device: Device = CPU, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    return make_copy_key(source, device, dtype, QUANTIZATION | changes)


def touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def grow(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")


def reword_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"layers.1", b"layers.7", 1))


def flip_last_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def add_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')


@pytest.mark.parametrize("change", [touch, grow, reword_header, flip_last_weight, change_config, add_index])
def test_another_model_in_the_same_folder_has_another_copy(model_dir: Path, change: Callable[[Path], None]) -> None:
    path = model_dir / "model.safetensors"
    before = key_of(find_model(str(model_dir)))
    assert key_of(find_model(str(model_dir))) == before
    times = path.stat().st_mtime_ns
    change(model_dir)
    if change is not touch:
        os.utime(path, ns=(times, times))  # only what the change is about tells it
    after = key_of(find_model(str(model_dir)))
    assert after.content != before.content
    assert after.series == before.series


def say_version(changed: str, name: str) -> str:
    return "0" if name == changed else "1"


def test_a_copy_is_of_one_place_device_type_quantization_and_version(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(str(model_dir))
    moved = Path(shutil.copytree(model_dir, tmp_path / "moved"))
    keys = [
        key_of(source),
        key_of(find_model(str(moved))),
        key_of(source, Device("cuda", "one card")),
        key_of(source, Device("cuda", "another card")),
        key_of(source, dtype=torch.float16),
        key_of(source, bnb_4bit_use_double_quant=False),
    ]
    assert len({key.series for key in keys}) == len({key.content for key in keys}) == len(keys)
    assert key_of(source, Device("cpu", "CPU (64 threads)")) == keys[0]
    others = []
    with monkeypatch.context() as patch:
        patch.setattr(nf4_key, "FORMAT_VERSION", 0)
        others.append(key_of(source))
    for package in ("bitsandbytes", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(nf4_key.importlib.metadata, "version", partial(say_version, package))
            others.append(key_of(source))
    assert len({key.content for key in [keys[0], *others]}) == 5
    assert {key.series for key in others} == {keys[0].series}


def test_a_model_of_the_hub_is_known_by_its_commit() -> None:
    def key(commit: str | None) -> Any:
        return key_of(ModelSource("a/b", "a/b", "main", commit, {"model_type": "llama"}))

    assert key("1").content != key("2").content
    assert key("1").series == key("2").series
    assert key(None) is None


def test_pickled_weights_and_folders_with_an_adapter_have_no_copy(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text("{}")
    assert key_of(find_model(str(model_dir))) is None
    (model_dir / "adapter_config.json").unlink()
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert key_of(find_model(str(model_dir))) is None


def cut_short(content: bytearray) -> bytes:
    return content[:-1]


def empty(content: bytearray) -> bytes:
    return b""


def lengthen(content: bytearray) -> bytes:
    return content + b"\0"


def flip_header(content: bytearray) -> bytes:
    return content.replace(b"layers.1", b"layers.0", 1)


def flip_type(content: bytearray) -> bytes:
    return content.replace(b'"BF16"', b'"F16" ', 1)


def flip_first_weight(content: bytearray) -> bytes:
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    return content


def flip_end(content: bytearray) -> bytes:
    content[-1] ^= 128
    return content


def endless_header(content: bytearray) -> bytes:
    return b"\xff" * 8 + content[8:]


@pytest.mark.parametrize(
    "damage",
    [cut_short, empty, lengthen, flip_header, flip_type, flip_first_weight, flip_end, endless_header],
)
def test_a_damaged_copy_is_told_and_made_anew(model_dir: Path, damage: Callable[[bytearray], bytes]) -> None:
    fresh, _ = load(model_dir)
    [copy] = copies()
    intact = copy.read_bytes()
    copy.write_bytes(damage(bytearray(intact)))
    assert copy.read_bytes() != intact
    again, notices = load(model_dir)
    assert_same(fresh, again)
    assert "was damaged" in notices[0]
    assert "made anew" in notices[0]
    assert notices[1].startswith("Kept a quantized copy")
    assert copies() == [copy]
    assert copy.read_bytes() == intact


def test_a_copy_of_another_model_under_this_name_is_not_taken(model_dir: Path, tmp_path: Path) -> None:
    fresh, _ = load(model_dir)
    [own] = copies()
    load(write_random_model(tmp_path / "deeper", num_hidden_layers=3))
    [other] = set(copies()) - {own}
    shutil.copy(other, own)
    again, notices = load(model_dir)
    assert "it is of another model" in notices[0]
    assert_same(fresh, again)


def test_an_earlier_copy_of_the_series_goes_and_others_stay(model_dir: Path, tmp_path: Path) -> None:
    load(model_dir, torch.float32)
    load(write_random_model(tmp_path / "other"))
    kept = set(copies())
    load(model_dir)
    [earlier] = set(copies()) - kept
    touch(model_dir)
    load(model_dir)
    [newer] = set(copies()) - kept
    assert newer.name != earlier.name
    assert len(copies()) == 3


def test_a_small_model_is_not_kept(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model_dir)
    num_bytes = copies()[0].stat().st_size
    copies()[0].unlink()
    monkeypatch.setattr(nf4_cache, "LEAST_COPY_BYTES", num_bytes)
    _, notices = load(model_dir)
    assert copies() == notices == []


def test_without_room_nothing_is_kept(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cache, "SPARE_BYTES", 2**60)
    _, [notice] = load(model_dir)
    assert "No quantized copy was kept" in notice
    assert "free there" in notice
    assert copies() == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(descriptor: int, content: Any, first_byte: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nf4_file, "_write_whole", fill_up)
    _, [notice] = load(model_dir)
    assert notice == f"No quantized copy was kept in {nf4_cache_dir()}: No space left on device."
    assert copies() == []


def test_a_cache_folder_that_is_a_file_stops_nothing(model_dir: Path) -> None:
    nf4_cache_dir().parent.mkdir(parents=True)
    nf4_cache_dir().write_text("")
    model, notices = load(model_dir)
    assert model.is_loaded_in_4bit
    assert any("No quantized copy was kept" in notice for notice in notices)


def test_a_read_only_cache_stops_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nf4_cache_dir().mkdir(parents=True)

    def refuse_writing(path: Path, flags: int, mode: int = 0o777) -> int:  # root may write into any folder
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_any(path, flags, mode)

    open_any = os.open
    monkeypatch.setattr(nf4_cache.os, "open", refuse_writing)
    model, [notice] = load(model_dir)
    assert model.is_loaded_in_4bit
    assert notice == f"No quantized copy was kept in {nf4_cache_dir()}: Permission denied."


def test_a_cache_folder_that_leads_elsewhere_is_not_followed(model_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    nf4_cache_dir().parent.mkdir(parents=True)
    nf4_cache_dir().symlink_to(elsewhere)
    _, notices = load(model_dir)
    assert all("the folder is a link" in notice for notice in notices)
    assert len(notices) == 2
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_cache_folder_that_others_may_write_into_is_not_used(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    load(model_dir)
    nf4_cache_dir().chmod(mode)
    _, notices = load(model_dir)
    assert [notice.rpartition(": ")[2] for notice in notices] == ["others than its owner may write there."] * 2
    nf4_cache_dir().chmod(0o755)
    forbid_quantizing(monkeypatch)
    assert load(model_dir)[1] == []


def test_a_copy_of_another_user_is_not_read(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, _ = load(model_dir)
    [copy] = copies()
    inode = copy.stat().st_ino
    tell = os.fstat

    def tell_another_owner(descriptor: int) -> os.stat_result:
        fields = list(tell(descriptor))
        fields[stat.ST_UID] += fields[stat.ST_INO] == inode
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", tell_another_owner)
    again, notices = load(model_dir)
    assert notices[0] == f"The quantized copy {copy} can't be read: the file belongs to another user."
    assert notices[1].startswith("Kept")
    assert_same(fresh, again)
    assert copy.stat().st_ino != inode  # it made way for an own one
    assert load(model_dir)[1] == []


def test_a_copy_that_is_a_link_is_replaced_not_followed(model_dir: Path, tmp_path: Path) -> None:
    load(model_dir)
    [copy] = copies()
    target = Path(shutil.move(copy, tmp_path / "target"))
    content = target.read_bytes()
    copy.symlink_to(target)
    fresh, notices = load(model_dir)
    assert "can't be read" in notices[0]
    assert not copy.is_symlink()
    assert target.read_bytes() == content
    assert_same(fresh, load(model_dir)[0])


def test_weights_that_are_missing_are_refused_and_not_kept(model_dir: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete.*layers\.1\.mlp\.up_proj\.weight missing"):
        load(model_dir)
    assert copies() == []


def test_weights_of_another_shape_are_refused_and_not_kept(model_dir: Path) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 192}))
    with pytest.raises(ModelError, match=r"config\.json says"):
        load(model_dir)
    assert copies() == []


def test_damaged_weights_are_told_although_there_is_a_copy_of_earlier_ones(model_dir: Path) -> None:
    from dsft.core.models.load import load_quantized

    load(model_dir, torch.float32)
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="can't be loaded"):
        load_quantized(find_model(str(model_dir)), CPU, "fp32", AttentionKernel(PER_SAMPLE, ""))


LOAD_SLOWLY = """
import sys, time
from pathlib import Path
import torch
from dsft.core.models import nf4_cache, nf4_file
from dsft.core.models.device import Device
from dsft.core.models.nf4_model import load_nf4_model
from dsft.core.models.source import find_model
nf4_cache.LEAST_COPY_BYTES = nf4_cache.SPARE_BYTES = 0
write = nf4_file._write_whole
def write_slowly(*args):
    write(*args)
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
nf4_file._write_whole = write_slowly
load_nf4_model(find_model(sys.argv[1]), Device("cpu", "CPU"), torch.bfloat16, {}, lambda text: print(text, flush=True))
"""


def start_loading(folder: Path, started: Path, pause_s: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD_SLOWLY, str(folder), str(started), str(pause_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_write_leaves_nothing_that_is_read(model_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start_loading(model_dir, tmp_path / "started", 0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    left = copies()
    assert all(path.name.endswith(".partial") for path in left)
    assert len(left) == (0 if number == signal.SIGINT else 1)
    _, [notice] = load(model_dir)
    assert notice.startswith("Kept")
    [copy] = copies()
    assert copy.suffix == ".safetensors"


def test_what_a_killed_write_of_another_model_left_is_removed(model_dir: Path) -> None:
    nf4_cache_dir().mkdir(parents=True)
    (nf4_cache_dir() / ".abandoned.safetensors.partial").write_bytes(b"x")
    load(model_dir)
    [copy] = copies()
    assert copy.suffix == ".safetensors"


def test_while_one_process_writes_another_neither_waits_nor_writes(model_dir: Path, tmp_path: Path) -> None:
    process = start_loading(model_dir, tmp_path / "started", 600)
    try:
        [partial] = copies()
        _, notices = load(model_dir)
        assert notices == []
        assert copies() == [partial]
    finally:
        process.kill()
        process.communicate()


def load_in_process(folder: Path, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    nf4_cache.LEAST_COPY_BYTES = nf4_cache.SPARE_BYTES = 0
    barrier.wait()
    for _ in range(3):
        model, notices = load(folder)
        total = sum(float(tensor.double().sum()) for tensor in model.state_dict().values())
        results.put((total, [notice.partition(" (")[0] for notice in notices]))


def test_processes_that_start_at_once_have_the_same_model(model_dir: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=load_in_process, args=(model_dir, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=200) for _ in range(9)]
    for process in processes:
        process.join()
    assert len({total for total, _ in found}) == 1
    notices = [notice for _, told in found for notice in told]
    assert set(notices) == {"Kept a quantized copy"}
    [copy] = copies()
    assert copy.suffix == ".safetensors"


def test_a_copy_that_is_replaced_while_it_is_read_stays_whole(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, _ = load(model_dir)
    [copy] = copies()
    read = nf4_file.CopyFile.read_into

    def replace_first(file: Any, tensors: Any) -> None:
        copy.unlink()
        copy.write_bytes(b"something else")
        read(file, tensors)

    monkeypatch.setattr(nf4_file.CopyFile, "read_into", replace_first)
    again, notices = load(model_dir)
    assert notices == []
    assert_same(fresh, again)


def test_large_tensors_are_read_in_pieces_and_each_is_checked(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_file, "_PIECE_BYTES", 1000)
    fresh, _ = load(model_dir)
    [copy] = copies()
    again, notices = load(model_dir)
    assert notices == []
    assert_same(fresh, again)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert "its content was changed" in load(model_dir)[1][0]


def test_a_checkpoint_can_be_loaded_while_a_copy_is_read(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    fresh, _ = load(model_dir)
    other_dir = write_random_model(tmp_path / "other")
    expected = load_file(other_dir / "model.safetensors")
    read, others = nf4_file.CopyFile.read_into, []

    def load_other_first(file: Any, tensors: Any) -> None:
        others.append(AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32))
        read(file, tensors)

    monkeypatch.setattr(nf4_file.CopyFile, "read_into", load_other_first)
    again, notices = load(model_dir)
    assert notices == []
    assert_same(fresh, again)
    [other] = others
    found = other.state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())


def test_a_model_that_was_read_is_of_transformers_own_class(model_dir: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, PreTrainedModel

    reading = PreTrainedModel._load_pretrained_model
    load(model_dir)
    read, notices = load(model_dir)
    assert notices == []
    assert type(read) is LlamaForCausalLM
    assert PreTrainedModel._load_pretrained_model is LlamaForCausalLM._load_pretrained_model is reading
    gc.collect()
    assert LlamaForCausalLM.__subclasses__() == []  # the class of that one call is gone, and the copy with it
    assert type(pickle.loads(pickle.dumps(read))) is LlamaForCausalLM
    adapted = get_peft_model(read, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(adapted.get_base_model()) is LlamaForCausalLM


def test_a_family_is_one_class() -> None:
    """What a copy is read into is found by the family alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    assert all(isinstance(found, type) for found in MODEL_FOR_CAUSAL_LM_MAPPING.values())


def test_of_a_model_for_images_too_the_text_part_is_the_same_from_a_copy(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3_5Config

    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    config = Qwen3_5Config(text_config=text | {"num_attention_heads": 4, "num_key_value_heads": 2})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    fresh, notices = load(tmp_path / "model")
    assert notices[0].startswith("Kept")
    read, notices = load(tmp_path / "model")
    assert notices == []
    assert_same(fresh, read)
