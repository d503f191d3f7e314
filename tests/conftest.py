"""What every test gets: an environment of its own, the shared material, and a way to run the command."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# huggingface_hub reads these once, when it is imported: before any test can set them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# As dsft itself does; torch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes of tests beside one another, that would take each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# `python -m dsft` in child processes is this checkout, whatever their working directory.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

RunDsft = Callable[..., "subprocess.CompletedProcess[str]"]

gc.disable()  # until all is imported: looking again and again at what stays is a fifth of the time


def pytest_collection_finish() -> None:
    """Keep what is imported out of garbage collections: training asks for many, and each would look at all of it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """Do so again after a file whose tests prepare data, which ends with all objects looked at as before."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _isolated_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep fixtures that several tests share from the user's caches, too: they are made before a test's environment."""
    home = tmp_path_factory.mktemp("shared-home")
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in (("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state")):
            patch.setenv(variable, str(home / folder))
        yield


@pytest.fixture(autouse=True)
def _isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests from the user's caches and from settings of the shell they are started in."""
    home = tmp_path_factory.mktemp("home")
    for variable, folder in (("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state"), ("HF_HOME", "huggingface")):
        monkeypatch.setenv(variable, str(home / folder))
    for variable in ("DSFT_DEBUG", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The material beside the repository; tests that need it are skipped where it is missing."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no ../shared beside the repository")
    return folder


@pytest.fixture
def run_dsft(tmp_path: Path) -> RunDsft:
    """Run `dsft` as a process of its own: `run_dsft("train", "--dry-run", cwd=..., input=..., timeout=...)`."""

    def run(*args: str, **options: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "dsft", *args]
        settings = {"cwd": tmp_path, "timeout": 120} | options
        return subprocess.run(command, capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]

    return run
