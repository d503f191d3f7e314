"""Rows in a file: a new one, one that is gone on with, and places that can't be written."""

import csv
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsft.core.errors import ConfigError, WriteError
from dsft.core.units import GIB
from dsft.monitor.csv_log import COLUMNS, CsvLog
from dsft.monitor.sample import ProcessSample, Sample
from tests.monitor_readers import GPU, HOST, NO_DRIVER, make_gpu, make_lost_gpu, make_sample

SAMPLE = make_sample(GPU, host=HOST)


def write(path: Path, *samples: Sample) -> None:
    with CsvLog(path) as log:
        for sample in samples:
            log.write(sample)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_a_new_file_has_a_header_and_a_row_for_each_gpu(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    process = ProcessSample(1, "compute", GIB)
    gpu = make_gpu(1, throttle_reasons=("sw_power_cap", "hw_slowdown"), processes=(process, process))
    write(path, make_sample(GPU, gpu, host=HOST))
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    first, second = read(path)
    assert first["time"] == second["time"] == SAMPLE.time
    assert (first["gpu_index"], first["gpu_uuid"], first["gpu_name"]) == ("0", "GPU-0000", "NVIDIA Test")
    assert first["gpu_memory_used_bytes"] == str(10 * GIB)
    assert (first["gpu_temperature_c"], first["gpu_power_w"]) == ("61", "280.4")
    assert (first["gpu_is_mig_enabled"], first["gpu_num_processes"], second["gpu_num_processes"]) == ("false", "0", "2")
    assert (first["host_memory_total_bytes"], first["host_swap_total_bytes"]) == (str(16 * GIB), "0")
    assert second["gpu_throttle_reasons"] == "sw_power_cap|hw_slowdown"
    assert second["gpu_index"] == "1"


def test_what_is_not_told_is_empty_never_0_and_no_reason_is_a_word(tmp_path: Path) -> None:
    write(tmp_path / "x", make_sample(GPU, make_gpu(1, throttle_reasons=None, processes=None)))
    first, second = read(tmp_path / "x")
    assert (first["gpu_throttle_reasons"], second["gpu_throttle_reasons"]) == ("none", "")
    assert (first["gpu_fan_percent"], second["gpu_num_processes"], first["gpu_problem"]) == ("", "", "")
    assert {first[name] for name in COLUMNS if name.startswith("host_")} == {""}


def test_a_lost_gpu_is_a_row_and_so_is_no_gpu_at_all(tmp_path: Path) -> None:
    write(tmp_path / "x", make_sample(GPU, make_lost_gpu(1)), make_sample(problem=NO_DRIVER, host=HOST), make_sample())
    well, lost, none, empty = read(tmp_path / "x")
    assert (well["gpu_problem"], lost["gpu_problem"]) == ("", "gpu_lost")
    assert (lost["gpu_index"], lost["gpu_memory_used_bytes"]) == ("1", "")
    assert (none["gpu_problem"], none["gpu_index"], none["host_num_cpus"]) == ("no_driver", "", "8")
    assert {value for name, value in empty.items() if name != "time"} == {""}


def test_large_numbers_and_odd_text_stay_what_they_are(tmp_path: Path) -> None:
    gpu = make_gpu(name='a "b", c', pcie_rx_bytes_per_s=12_345_678_901.0)
    write(tmp_path / "x", make_sample(gpu, host=replace(HOST, disk_path="/é\udcff", load_average_1_min=0.25)))
    (row,) = read(tmp_path / "x")
    assert row["gpu_name"] == 'a "b", c'
    assert row["gpu_pcie_rx_bytes_per_s"] == "12345678901"
    assert row["host_load_average_1_min"] == "0.25"
    assert row["host_disk_path"] == "/é\\udcff"


def test_columns_are_named_once_and_by_where_they_come_from() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert COLUMNS[0] == "time"
    assert all(name.startswith(("gpu_", "host_")) and not name.startswith("gpu_gpu_") for name in COLUMNS[1:])


def test_a_row_is_in_the_file_before_the_next_sample(tmp_path: Path) -> None:
    with CsvLog(tmp_path / "x") as log:
        log.write(SAMPLE)
        assert len(read(tmp_path / "x")) == 1
        log.write(SAMPLE)
        assert len(read(tmp_path / "x")) == 2


@pytest.mark.parametrize("before", [b"", None])
def test_an_earlier_file_is_gone_on_with(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "x"
    if before is not None:
        path.write_bytes(before)
    write(path, SAMPLE)
    write(path, SAMPLE)
    assert len(read(path)) == 2


def test_line_ends_of_windows_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(",".join(COLUMNS).encode() + b"\r\n")
    write(path, SAMPLE)
    assert len(read(path)) == 1


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_row_that_was_cut_short_does_not_swallow_the_next(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "x"
    write(path, SAMPLE)
    header, row = path.read_text().splitlines()
    path.write_text(f"{header}\n{row[: round(len(row) * kept)]}")
    write(path, SAMPLE)
    assert path.read_text().splitlines()[2] == row
    assert read(path)[1]["gpu_uuid"] == "GPU-0000"


def test_a_header_without_an_end_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(",".join(COLUMNS))
    write(path, SAMPLE)
    assert len(read(path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,2\n", b"\n", b"\x00\xff\xfe", b'"', b"a\rb\n", b"x" * 300_000,
        *(",".join(columns).encode() + b"\n" for columns in (COLUMNS[:-1], (*COLUMNS, "more"), COLUMNS[1:])),
        ",".join(COLUMNS)[:20].encode(),
    ],
)  # fmt: skip
def test_a_file_with_something_else_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds something else"):
        CsvLog(path)
    assert path.read_bytes() == content


def test_a_folder_and_a_place_that_is_not_there_are_the_user_s_error(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no" / "x", "No such file or directory")):
        with pytest.raises(ConfigError, match=f"can't be written: {reason}") as caught:
            CsvLog(path)
        assert str(path) in caught.value.found


def test_a_file_that_may_not_be_written_is_the_user_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = Path.open

    def refuse(path: Path, mode: str = "r", *args: Any, **settings: Any) -> Any:
        if "a" in mode:  # whoever runs the tests may be root, whom no permission stops
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, mode, *args, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match="can't be written: Permission denied"):
        CsvLog(tmp_path / "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_failure_that_is_told_once() -> None:
    log = CsvLog(Path("/dev/full"))
    with pytest.raises(WriteError, match="--csv /dev/full can't be written any more: No space left") as caught, log:
        log.write(SAMPLE)
    assert caught.value.fix


def collect(path: Path, into: list[bytes]) -> threading.Thread:
    def run() -> None:
        with path.open("rb") as reader:
            into.append(reader.read())

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_pipe_gets_header_and_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = collect(tmp_path / "pipe", got)
    write(tmp_path / "pipe", SAMPLE, SAMPLE)
    reader.join(timeout=30)
    assert len(got[0].decode().splitlines()) == 3


def test_a_pipe_without_a_reader_left_is_a_failure(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    held: list[int] = []
    opener = threading.Thread(target=lambda: held.append(os.open(tmp_path / "pipe", os.O_RDONLY)))
    opener.start()
    log = CsvLog(tmp_path / "pipe")
    opener.join(timeout=30)
    os.close(held[0])
    with pytest.raises(WriteError, match="Broken pipe"), log:
        log.write(SAMPLE)


class HalfWriter:
    """Takes half of what is given, as a file on a disk that is filling up may."""

    def __init__(self) -> None:
        self.taken = b""

    def write(self, content: bytes) -> int:
        half = max(1, len(content) // 2)
        self.taken += content[:half]
        return half

    def close(self) -> None:
        pass


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path: Path) -> None:
    writer = HalfWriter()
    with CsvLog(tmp_path / "x") as log:
        log._file.close()
        log._file = writer  # type: ignore[assignment]
        log.write(SAMPLE)
    (row,) = csv.DictReader(writer.taken.decode().splitlines())
    assert row["gpu_uuid"] == "GPU-0000"
