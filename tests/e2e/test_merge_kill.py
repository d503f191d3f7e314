"""`dsft merge` killed at any moment, and stopped by signals: the older model, none, or the whole new one is left."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.merge_driver import MergeDriver
from tests.scripted_models import write_adapter, write_random_model

SHARDS = {"max_shard_bytes": 8 * 2**20}
OF_THE_RUN = {"README.md", "merge_summary.json"}
"""Files with times in them; the others are the same in each merge."""


def hash_files(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.iterdir():
        if path.name not in OF_THE_RUN:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@dataclass(frozen=True)
class Place:
    """An adapter's folder, and what a merged model in it may be: the old one in float16, the new one in bfloat16."""

    run: Path
    known: dict[str, dict[str, str]]
    masters: dict[str, Path]
    own_names: frozenset[str]

    @property
    def target(self) -> Path:
        return self.run / "merged_model"

    def put(self, state: str | None) -> None:
        if self.target.exists():
            shutil.rmtree(self.target)
        if state is not None:
            shutil.copytree(self.masters[state], self.target, copy_function=os.link)

    def find_state(self) -> str | None:
        """Return which model is there, all files compared; None where there is none."""
        if not self.target.exists():
            return None
        hashes = hash_files(self.target)
        [state] = [state for state, known in self.known.items() if known == hashes]
        assert json.loads((self.target / "merge_summary.json").read_text())["output"] == str(self.target)
        assert (self.target / "README.md").read_text().endswith("\n")
        return state

    def check_leftovers(self) -> int:
        """Check that no folder but the target loads in part; return how many hold something."""
        others = [path for path in self.run.iterdir() if path.name not in self.own_names and path != self.target]
        for folder in others:
            if is_loadable(folder):
                weights = {name: each for name, each in hash_files(folder).items() if name.startswith("model")}
                whole = [
                    {name: each for name, each in known.items() if name.startswith("model")}
                    for known in self.known.values()
                ]
                assert weights in whole, f"{folder} loads in part"
        return len(others)

    def check_clean(self) -> None:
        assert {path.name for path in self.run.iterdir()} == self.own_names | {"merged_model"}


def is_loadable(folder: Path) -> bool:
    try:
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


@pytest.fixture(scope="module")
def driver() -> Iterator[MergeDriver]:
    driver = MergeDriver()
    yield driver
    driver.close()


def make_place(driver: MergeDriver, folder: Path, **settings: int) -> Place:
    base = write_random_model(folder / "base", **settings)
    run = folder / "run"
    write_adapter(run, base)
    own_names = frozenset(path.name for path in run.iterdir())
    known, masters = {}, {}
    for state, dtype in (("old", "float16"), ("new", "bfloat16")):
        ended = driver.merge(str(run), "--dtype", dtype, **SHARDS)
        assert ended["code"] == 0, ended["records"][-1]
        masters[state] = shutil.move(run / "merged_model", folder / state)
        known[state] = hash_files(masters[state])
        model, info = AutoModelForCausalLM.from_pretrained(masters[state], output_loading_info=True)
        assert not any(info.values()), info
        assert str(model.dtype) == f"torch.{dtype}"
    assert known["old"].keys() == known["new"].keys()
    return Place(run, known, masters, own_names)


@pytest.fixture(scope="module")
def place(driver: MergeDriver, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("large")
    place = make_place(driver, folder, hidden_size=512, intermediate_size=1408, num_hidden_layers=8)
    assert len(place.known["new"]) > 10  # several files of weights
    return place


@pytest.fixture(scope="module")
def small_place(driver: MergeDriver, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(driver, tmp_path_factory.mktemp("small"))


def kill_at_random_moments(driver: MergeDriver, place: Place, before: str | None, num_kills: int) -> None:
    place.put(before)
    overwrite = ["--overwrite"]  # a merge that a kill came too late for has left a model
    whole = driver.merge(str(place.run), *overwrite, **SHARDS)
    assert whole["code"] == 0
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    num_leftovers, states = 0, set()
    for kill in range(num_kills):
        place.put(before)
        after_s = 1.05 * whole["wall_s"] * (kill + moments.random()) / num_kills
        ended = driver.merge(str(place.run), *overwrite, signal=signal.SIGKILL, after_s=after_s, **SHARDS)
        assert ended["code"] in {-signal.SIGKILL, 0}
        state = place.find_state()
        assert state in {before, "new"}, f"seed {seed}"
        assert state == "new" or ended["code"] != 0
        states.add(state)
        num_leftovers += place.check_leftovers()
    assert before in states and num_leftovers > 0
    assert driver.merge(str(place.run), *overwrite, **SHARDS)["code"] == 0
    assert place.find_state() == "new"
    place.check_clean()


@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_leaves_the_older_model_or_the_whole_new_one(
    driver: MergeDriver, place: Place, before: str | None
) -> None:
    kill_at_random_moments(driver, place, before, num_kills=6)


@pytest.mark.long
@pytest.mark.parametrize("before", [None, "old"])
def test_fifty_kills_leave_the_older_model_or_the_whole_new_one(
    driver: MergeDriver, place: Place, before: str | None
) -> None:
    kill_at_random_moments(driver, place, before, num_kills=50)


@pytest.mark.parametrize(
    ("way", "states"),
    [
        ("new", [None, "new"]),
        ("exchange", ["old", "new", "new"]),
        ("two renames", ["old", None, "new"]),
    ],
)
def test_a_kill_between_the_steps_of_moving_in(
    driver: MergeDriver, small_place: Place, way: str, states: list[str | None]
) -> None:
    """After each the next merge puts the older model back, or clears what is left of it."""
    place, before = small_place, None if way == "new" else "old"
    settings = {"can_exchange": way != "two renames", **SHARDS}
    for step, state in enumerate(states):
        place.put(before)
        ended = driver.merge(str(place.run), "--no-verify", "--overwrite", step=step, **settings)
        assert ended["code"] == -signal.SIGKILL
        assert place.find_state() == state
        assert place.check_leftovers() > 0 or state == "new"
        if state is None and before is not None:
            again = driver.merge(str(place.run), "--no-verify", **settings)
            assert again["code"] == 2
            assert "already holds a merged model" in again["records"][-1]["error"]["found"]
            assert place.find_state() == "old"
        again = driver.merge(str(place.run), "--no-verify", "--overwrite", **settings)
        assert again["code"] == 0
        assert place.find_state() == "new"
        place.check_clean()


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("phase", ["merge", "verify"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_leaves_nothing_but_the_older_model(
    driver: MergeDriver, place: Place, number: signal.Signals, code: int, phase: str, before: str | None
) -> None:
    place.put(before)
    ended = driver.merge(
        str(place.run), "--overwrite", signal=number, phase=phase, after_s=random.uniform(0, 0.03), **SHARDS
    )
    assert ended["code"] == code
    error = ended["records"][-1]["error"]
    assert error["found"] == f"{number.name}; nothing more was saved."
    assert error["exit_code"] == code
    assert place.find_state() == before
    assert place.check_leftovers() == 0


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_moment_leaves_no_second_folder(
    driver: MergeDriver, place: Place, number: signal.Signals, code: int
) -> None:
    place.put("old")
    whole = driver.merge(str(place.run), "--overwrite", **SHARDS)
    for trial in range(30):
        place.put("old")
        after_s = 1.05 * whole["wall_s"] * (trial + random.random()) / 30
        ended = driver.merge(str(place.run), "--overwrite", signal=number, after_s=after_s, **SHARDS)
        last = ended["records"][-1]
        state = place.find_state()
        if ended["code"] == 0:
            assert (state, last["event"]) == ("new", "MergeResult")
        elif state == "new":
            assert "it holds the new model" in last["error"]["fix"]
        else:
            assert (state, ended["code"]) == ("old", code)
        place.check_clean()


@pytest.mark.parametrize(
    ("number", "code", "phase"),
    [(signal.SIGINT, 130, "merge"), (signal.SIGTERM, 143, "verify"), (signal.SIGHUP, 143, "merge")],
)
def test_a_signal_at_the_command_line(place: Place, number: signal.Signals, code: int, phase: str) -> None:
    place.put("old")
    command = [sys.executable, "-m", "dsft", "merge", str(place.run), "--overwrite", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while f'"phase": "{phase}"' not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        told = process.stdout.read()
        error = process.stderr.read()
        assert process.wait(timeout=60) == code
    assert error == f"stopped: {number.name}; nothing more was saved.\n"
    assert json.loads(told.splitlines()[-1])["error"]["exit_code"] == code
    assert place.find_state() == "old"
    assert place.check_leftovers() == 0


def test_of_two_merges_at_once_into_one_place_the_second_is_refused_by_name(
    driver: MergeDriver, place: Place, tmp_path: Path
) -> None:
    place.put(None)
    command = [sys.executable, "-m", "dsft", "merge", str(place.run), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while '"phase": "merge"' not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        try:
            refused = [driver.merge(str(place.run), *options) for options in ([], ["--overwrite"])]
            elsewhere = driver.merge(str(place.run), "--output", str(tmp_path / "out"), **SHARDS)
        finally:
            process.send_signal(signal.SIGCONT)
        told = process.stdout.read()
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert elsewhere["code"] == 0
    assert hash_files(tmp_path / "out") == place.known["new"]
    for second in refused:
        assert second["code"] == 2
        found = second["records"][-1]["error"]["found"]
        assert found == f"Another dsft command is writing into {place.run / '.merged_model.writing'} now."
    assert json.loads(told.splitlines()[-1])["output"] == str(place.target)
    place.check_clean()
