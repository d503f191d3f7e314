"""NVML's errors as sentences that fit where the monitor runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml as nvml
import pytest

from dsft.monitor.nvml.problems import (
    Surroundings,
    describe_device_problem,
    describe_no_gpu,
    describe_nvml_problem,
    look_around,
)
from tests.fake_nvml import FakeNvml


def describe(code: int, **around: Any) -> Any:
    return describe_nvml_problem(FakeNvml([]), nvml.NVMLError(code), Surroundings(**around))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no_driver"),
        (nvml.NVML_ERROR_DRIVER_NOT_LOADED, "driver_not_loaded"),
        (nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version_mismatch"),
        (nvml.NVML_ERROR_NO_PERMISSION, "no_permission"),
        (nvml.NVML_ERROR_UNINITIALIZED, "nvml_error"),
        (nvml.NVML_ERROR_UNKNOWN, "nvml_error"),
        (4711, "nvml_error"),
    ],
)
@pytest.mark.parametrize(
    "around", [{}, {"is_wsl": True}, {"is_container": True}, {"has_nvidia_card": False}, {"has_nvidia_card": True}]
)
def test_every_problem_is_a_sentence_and_a_remedy(code: int, kind: str, around: dict[str, Any]) -> None:
    problem = describe(code, **around)

    assert problem.kind == kind
    for sentence in (problem.found, problem.fix):
        assert sentence[0].isupper()
        assert sentence.endswith((".", ")."))
        assert "None" not in sentence


def test_windows_has_the_driver_under_wsl() -> None:
    for code in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
        problem = describe(code, is_wsl=True, has_nvidia_card=False)

        assert "/usr/lib/wsl/lib" in problem.fix
        assert "Windows" in problem.fix
        assert "PCI" not in problem.found  # there it has no card of its own


def test_a_container_has_to_be_started_with_the_gpu() -> None:
    assert "--gpus all" in describe(nvml.NVML_ERROR_LIBRARY_NOT_FOUND, is_container=True).fix
    assert "--gpus all" in describe_no_gpu(Surroundings(is_container=True)).fix
    assert "--gpus all" not in describe(nvml.NVML_ERROR_LIBRARY_NOT_FOUND).fix
    assert "Restart the container" in describe(nvml.NVML_ERROR_UNKNOWN, is_container=True).fix


def test_a_machine_without_a_card_needs_no_driver() -> None:
    problem = describe(nvml.NVML_ERROR_LIBRARY_NOT_FOUND, has_nvidia_card=False, is_container=True)

    assert "no NVIDIA GPU on this machine's PCI bus" in problem.found
    assert "Install" not in problem.fix


def test_a_driver_without_its_library_is_told_with_its_version() -> None:
    problem = describe(nvml.NVML_ERROR_LIBRARY_NOT_FOUND, loaded_version="580.1.2", has_nvidia_card=True)

    assert "580.1.2 is loaded" in problem.found


def test_a_mismatch_names_both_versions() -> None:
    problem = describe(nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, loaded_version="575.64.03")

    assert "the library is 580.159.04 and the kernel runs 575.64.03" in problem.found
    assert problem.fix == "Restart the machine."


def test_a_mismatch_is_told_without_versions_that_are_not_known() -> None:
    def fail() -> None:
        raise nvml.NVMLError(nvml.NVML_ERROR_UNINITIALIZED)

    module = SimpleNamespace(NVMLError=nvml.NVMLError, nvmlSystemGetNVMLVersion=fail)
    problem = describe_nvml_problem(module, nvml.NVMLError(18), Surroundings())
    assert problem.found == "NVIDIA's driver was updated while the old one is still running."


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (nvml.NVML_ERROR_GPU_IS_LOST, "gpu_lost", "dmesg"),
        (nvml.NVML_ERROR_RESET_REQUIRED, "gpu_lost", "nvidia-smi --gpu-reset -i GPU-1234"),
        (nvml.NVML_ERROR_GPU_NOT_FOUND, "gpu_lost", "dmesg"),
        (nvml.NVML_ERROR_UNKNOWN, "gpu_lost", "dmesg"),
        (nvml.NVML_ERROR_NO_PERMISSION, "no_permission", "/dev/nvidia*"),
        (nvml.NVML_ERROR_INSUFFICIENT_POWER, "nvml_error", "power cables"),
        (nvml.NVML_ERROR_IRQ_ISSUE, "nvml_error", "dmesg"),
    ],
)
def test_a_gpu_that_fails_is_named(code: int, kind: str, words: str) -> None:
    problem = describe_device_problem(nvml.NVMLError(code), 3, "NVIDIA Thing", "GPU-1234")

    assert problem.kind == kind
    assert "GPU 3 (NVIDIA Thing)" in problem.found
    assert words in problem.fix
    assert "None" not in describe_device_problem(nvml.NVMLError(code), 3, None, None).found


def test_a_card_without_an_address_is_reset_by_its_index() -> None:
    problem = describe_device_problem(nvml.NVMLError(nvml.NVML_ERROR_RESET_REQUIRED), 3, None, None)
    assert "nvidia-smi --gpu-reset -i 3," in problem.fix


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def test_an_empty_system_tells_nothing(tmp_path: Path) -> None:
    assert look_around(tmp_path) == Surroundings()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (nixbld@)\n"
            "GCC version:  gcc version 15.3.0 (GCC)\n",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Thu Feb 22 01:44:30 UTC 2026\n", "550.54"),
        ("", None),
    ],
)
def test_the_version_that_the_kernel_runs(tmp_path: Path, text: str, version: str | None) -> None:
    write(tmp_path, "proc/driver/nvidia/version", text)

    assert look_around(tmp_path).loaded_version == version


@pytest.mark.parametrize(
    ("release", "is_wsl"),
    [("5.15.167.4-microsoft-standard-WSL2\n", True), ("4.4.0-19041-Microsoft\n", True), ("6.18.44\n", False)],
)
def test_wsl_is_known_by_its_kernel(tmp_path: Path, release: str, is_wsl: bool) -> None:
    write(tmp_path, "proc/sys/kernel/osrelease", release)

    assert look_around(tmp_path).is_wsl == is_wsl


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv", "run/systemd/container"])
def test_a_container_is_known_by_its_mark(tmp_path: Path, mark: str) -> None:
    write(tmp_path, mark)

    assert look_around(tmp_path).is_container


@pytest.mark.parametrize(
    ("vendor", "device_class", "has_card"),
    [
        ("0x10de", "0x030000", True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x040300", False),  # the sound of such a card
        ("0x1234", "0x030000", False),
    ],
)
def test_a_card_is_known_by_its_vendor_and_class(
    tmp_path: Path, vendor: str, device_class: str, has_card: bool
) -> None:
    write(tmp_path, "sys/bus/pci/devices/0000:00:01.0/vendor", "0x8086\n")
    write(tmp_path, "sys/bus/pci/devices/0000:00:06.0/vendor", f"{vendor}\n")
    write(tmp_path, "sys/bus/pci/devices/0000:00:06.0/class", f"{device_class}\n")

    assert look_around(tmp_path).has_nvidia_card == has_card
