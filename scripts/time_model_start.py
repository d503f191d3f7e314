"""Time from the start of a process to a model in NF4, with and without its quantized copy; prints JSON.

    python3 scripts/time_model_start.py MODEL_DIR [--cold] > start.json

Each figure is of a process of its own: "transformers" quantizes as from_pretrained does, "first" quantizes and keeps
the copy, "second" reads it. The copy is kept in a folder that goes again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ("transformers", "first", "second")


def main() -> None:
    """Start the processes one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder with safetensors")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--cold", action="store_true", help="take the files out of the page cache before each process")
    parser.add_argument("--cache-dir", type=Path, help="folder beside which the copy is kept (default: /tmp's disk)")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if options.kind is not None:
        print(json.dumps(load_once(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.cache_dir) as cache:
        print(json.dumps(measure(options, Path(cache)), indent=2))


def measure(options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Return the record of all processes."""
    weights = sorted(Path(options.model).glob("*.safetensors"))
    runs: list[dict[str, Any]] = []
    for kind in KINDS:
        for _ in range(options.repeats):
            copies = list(cache.glob("dsft/nf4/*.safetensors"))
            if kind == "first":
                for copy in copies:
                    copy.unlink()
            if options.cold:
                for path in (*weights, *copies):
                    forget_pages(path)
            runs.append({"kind": kind, **start_process(options, cache, kind)})
    copies = list(cache.glob("dsft/nf4/*.safetensors"))
    return {
        "model": options.model,
        "dtype": options.dtype,
        "is_cold": options.cold,
        "weights_bytes": sum(path.stat().st_size for path in weights),
        "copy_bytes": sum(path.stat().st_size for path in copies),
        "is_always_the_same_model": len({run["state_checksum"] for run in runs}) == 1,
        "runs": runs,
    }


def forget_pages(path: Path) -> None:
    """Take a file out of the page cache."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # pages that are not written yet would stay
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def start_process(options: argparse.Namespace, cache: Path, kind: str) -> dict[str, Any]:
    """Run one process and return what it says of itself."""
    command = [sys.executable, __file__, options.model, "--dtype", options.dtype, "--kind", kind]
    completed = subprocess.run(
        [*command, "--started", str(time.time())],
        # The wait policy is the one that dsft chooses.
        env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return found


def load_once(options: argparse.Namespace) -> dict[str, Any]:
    """Load the model in this process and return times and peaks."""
    import torch

    from dsft.core.host_memory import peak_host_bytes
    from dsft.core.models.device import resolve_device
    from dsft.core.models.nf4_model import load_nf4_model
    from dsft.core.models.source import find_model

    dtype = getattr(torch, options.dtype)
    source, device = find_model(options.model), resolve_device("auto")
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    if device.kind == "cuda":
        torch.zeros(1, device="cuda")
    notices: list[str] = []
    loading_s = time.time()
    if options.kind == "transformers":
        model = load_by_transformers(source.location, device.kind, dtype)
    else:
        model = load_nf4_model(source, device, dtype, {}, notices.append)
    if device.kind == "cuda":
        torch.cuda.synchronize()
    ready_s = time.time()
    assert model.is_loaded_in_4bit
    figures = {
        "device": device.name,
        "start_to_ready_s": round(ready_s - options.started, 3),
        "load_s": round(ready_s - loading_s, 3),
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_allocated_bytes": torch.cuda.max_memory_allocated() if device.kind == "cuda" else None,
        "peak_device_reserved_bytes": torch.cuda.max_memory_reserved() if device.kind == "cuda" else None,
        "model_device_bytes": torch.cuda.memory_allocated() if device.kind == "cuda" else None,
        "notices": notices,
    }
    return figures | {"state_checksum": checksum(model)}


def checksum(model: Any) -> str:
    """Return a checksum over names and bytes of a model's weights and buffers, those outside its checkpoint too."""
    import torch

    value = 0
    for name, tensor in sorted((model.state_dict() | dict(model.named_buffers())).items()):
        content = tensor.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8).cpu()
        value = zlib.crc32(content.numpy().data, zlib.crc32(f"{name} {tensor.dtype}".encode(), value))
    return f"{value:08x}"


def load_by_transformers(location: str, device: str, dtype: Any) -> Any:
    """Load as transformers does by itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from dsft.core.models.nf4_model import QUANTIZATION

    return AutoModelForCausalLM.from_pretrained(
        location,
        quantization_config=BitsAndBytesConfig(**QUANTIZATION, bnb_4bit_compute_dtype=dtype),
        dtype=dtype,
        device_map={"": 0 if device == "cuda" else "cpu"},
    )


if __name__ == "__main__":
    main()
