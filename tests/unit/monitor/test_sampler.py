"""One sample from those who read, and the keys it has in JSON."""

import dataclasses
import types
import typing
from datetime import UTC, datetime

import pytest

from dsft.monitor import sample as sample_module
from dsft.monitor.alerts import Alert
from dsft.monitor.config import MonitorConfig
from dsft.monitor.sample import SCHEMA, DriverSample, RunSample, Sample
from dsft.monitor.sampler import Sampler
from tests.monitor_readers import GPU, HOST, NO_DRIVER, ScriptedGpus, ScriptedHost, ScriptedRuns

RUN = RunSample(pid=7, run_name="trained", started="2026-01-02T03:04:05+00:00", event_log="/x/events.jsonl")


def test_a_sample_holds_what_all_of_them_say_and_what_is_judged_of_it() -> None:
    config = MonitorConfig(alerts=(Alert("temp", ">", 60), Alert("cpu", ">", 60)))
    before = datetime.now(UTC)
    sample = Sampler(config, ScriptedGpus([GPU]), ScriptedHost(), ScriptedRuns(RUN)).read()
    assert sample.gpus == (GPU,)
    assert sample.host == HOST
    assert sample.runs == (RUN,)
    assert sample.driver == DriverSample("580.0", "13.0")
    assert sample.problem is None
    assert sample.schema == SCHEMA
    assert [(alert.alert, alert.is_fired) for alert in sample.alerts] == [("temp>60", True), ("cpu>60", False)]
    taken = datetime.fromisoformat(sample.time)
    assert -0.001 <= (taken - before).total_seconds() < 10
    assert taken.utcoffset() is not None
    assert len(sample.time) == len("2026-01-02T03:04:05.678+00:00")


def test_without_a_driver_host_and_runs_are_told_all_the_same() -> None:
    sample = Sampler(MonitorConfig(), ScriptedGpus(NO_DRIVER), ScriptedHost(), ScriptedRuns(RUN)).read()
    assert (sample.problem, sample.gpus, sample.driver) == (NO_DRIVER, (), None)
    assert (sample.host, sample.runs) == (HOST, (RUN,))


def test_a_host_that_is_not_asked_for_is_not_told() -> None:
    assert Sampler(MonitorConfig(reads_host=False), ScriptedGpus([GPU]), None, ScriptedRuns()).read().host is None


@pytest.mark.parametrize(("interval_s", "most"), [(0.1, 1), (0.3, 1), (1.0, 5), (10.0, 48)])
def test_measuring_pcie_takes_about_a_tenth_of_the_interval(interval_s: float, most: int) -> None:
    gpus = ScriptedGpus([GPU])
    sampler = Sampler(MonitorConfig(interval_s=interval_s), gpus, None, ScriptedRuns())
    for _ in range(3):
        sampler.read()
    assert gpus.num_pcie_measurements == [0, most, most]  # the first does not wait


def test_a_single_sample_measures_all_there_is_whatever_the_interval() -> None:
    gpus = ScriptedGpus([GPU])
    Sampler(MonitorConfig(is_once=True, interval_s=0.1), gpus, None, ScriptedRuns()).read()
    assert gpus.num_pcie_measurements[0] >= 2 * 64


UNITS = ("_bytes", "_percent", "_c", "_w", "_mhz", "_s", "_errors", "_errors_lifetime", "_1_min")
"""Load average is a number of processes over a minute."""

WITHOUT_UNIT = {
    "schema", "index", "gpu_index", "mig_index", "pid", "container_pid", "step", "first_step", "epoch",
    "pcie_generation", "pcie_generation_max", "pcie_width", "pcie_width_max",
    "value",  # of a limit; `unit` stands beside it
    "loss", "recent_losses", "validation_loss", "best_validation_loss",
}  # fmt: skip
"""Indexes, places in a count, and losses, which have the unit of their definition."""


def parts_of(kind: type) -> set[type]:
    """Return a dataclass and all that its fields are made of."""
    found = {kind}
    for hint in typing.get_type_hints(kind).values():
        for part in atoms_of(hint):
            if dataclasses.is_dataclass(part) and part not in found:
                found |= parts_of(part)
    return found


def atoms_of(hint: object) -> set[type]:
    """Return the plain types in an annotation such as `tuple[int, ...] | None`."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not ...]
    if not arguments:
        assert isinstance(hint, type)
        return {hint}
    return set().union(*map(atoms_of, arguments))


def test_every_class_of_the_layout_is_part_of_a_sample() -> None:
    classes = {value for value in vars(sample_module).values() if isinstance(value, type)}
    assert parts_of(Sample) == {kind for kind in classes if dataclasses.is_dataclass(kind)}


@pytest.mark.parametrize("kind", sorted(parts_of(Sample), key=lambda kind: kind.__name__))
def test_every_number_has_its_unit_in_its_name_or_needs_none(kind: type) -> None:
    for name, hint in typing.get_type_hints(kind).items():
        atoms = atoms_of(hint) - {types.NoneType}
        if atoms & {int, float}:
            is_counted = name.startswith("num_")
            assert name in WITHOUT_UNIT or is_counted or name.endswith(UNITS), f"{kind.__name__}.{name}"
        elif atoms == {bool}:
            assert name.startswith("is_"), f"{kind.__name__}.{name}"
        else:
            assert not name.endswith(UNITS), f"{kind.__name__}.{name} is no number"
            assert name not in WITHOUT_UNIT


def test_no_name_is_excused_that_is_not_there() -> None:
    names = {name for kind in parts_of(Sample) for name in typing.get_type_hints(kind)}
    assert names >= WITHOUT_UNIT
