"""Imports of large libraries: what holds while they go on, and what is not loaded on the way to a run."""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType

import pytest

from dsft.core.large_imports import large_imports, wake_cuda_driver

PREPARE_A_RUN = """
import json, os, sys
from dsft.cli.app import main
code = main(["train", "--preset", "tiny", "--dry-run", "--quiet", "--output-dir", "out", "--save-dir", "save"])
import gc
import torch
used = []
torch.compile(lambda x: x + 1, backend=lambda graph, inputs: used.append(graph) or graph.forward)(torch.ones(1))
print(json.dumps({
    "code": code,
    "modules": sorted(sys.modules),
    "compiler_setting": os.environ.get("TORCHDYNAMO_DISABLE"),
    "num_compiled": len(used),
    "num_frozen": gc.get_freeze_count(),
    "is_collecting": gc.isenabled(),
}))
"""


class Node:
    """Something that a cycle keeps."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def _nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.usefixtures("_nothing_imported")
def test_nothing_is_collected_during_the_imports_and_what_they_leave_is_not_looked_at_again():
    before = gc.get_freeze_count()
    with large_imports():
        assert not gc.isenabled()
        imported = [[index] for index in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(imported)


@pytest.mark.usefixtures("_nothing_imported")
def test_a_failed_import_leaves_collections_on():
    with pytest.raises(ImportError), large_imports():
        raise ImportError("libcudart.so is missing")
    assert gc.isenabled()


@pytest.mark.usefixtures("_nothing_imported")
def test_a_program_that_collects_nothing_stays_so():
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_later_run_keeps_no_garbage_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch", ModuleType("torch")))
    node = Node()
    alive = weakref.ref(node)
    del node
    with large_imports():
        assert gc.isenabled()
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("_nothing_imported")
def test_ctrl_c_waits_for_the_end_of_the_imports():
    reached = []

    def import_something() -> None:
        with large_imports():
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(100_000))
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        import_something()
    assert reached == ["the end"]
    assert gc.isenabled()


@pytest.mark.parametrize("chosen", [None, "0"])
def test_the_way_to_a_run_loads_no_compiler_and_leaves_it_usable(tmp_path: Path, chosen: str | None):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    completed = subprocess.run(
        [sys.executable, "-c", PREPARE_A_RUN],
        env=environment | ({"TORCHDYNAMO_DISABLE": chosen} if chosen is not None else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(completed.stdout.splitlines()[-1])
    assert found["code"] == 0
    modules = set(found["modules"])
    assert {"torch", "transformers.trainer", "peft", "bitsandbytes"} <= modules
    assert modules & {"torch._inductor.compile_fx", "torch._inductor.lowering", "matplotlib", "gguf", "trl"} == set()
    assert found["compiler_setting"] == chosen
    assert found["num_compiled"] == 1
    assert found["is_collecting"]


def test_the_driver_starts_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    went_on, started = threading.Event(), threading.Event()
    calls = []

    class Driver:
        def __init__(self, name: str) -> None:
            calls.append(name)

        def cuInit(self, flags: int) -> int:
            went_on.wait(60)
            calls.append(flags)
            started.set()
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    wake_cuda_driver()
    assert not started.is_set()
    went_on.set()
    assert started.wait(60)
    assert calls == ["libcuda.so.1", 0]
    assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"


def test_a_host_without_the_driver_is_no_trouble(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")
    monkeypatch.delenv("CUDA_MODULE_LOADING")
    tried = threading.Event()

    def fail(name: str) -> None:
        tried.set()
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    wake_cuda_driver()
    assert tried.wait(60)
    for thread in threading.enumerate():
        if thread.name == "cuda-driver":
            thread.join(60)  # what it raised would be a warning, which is an error here
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"
