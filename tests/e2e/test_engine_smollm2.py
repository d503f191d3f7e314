"""Losses of a real pretrained model on real text: the engine's are the plain path's, packed ones are unpacked ones.

The comparison is that of scripts/compare_engine.py, in float32 on a CPU, over fewer steps than docs/benchmarks has.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

NUM_STEPS = 20

MOST_APART = 5e-6
"""Of two losses, in nats, where both sides add the same numbers in float32 in another order; 1.2e-6 was seen."""


@pytest.fixture(scope="module")
def base(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "smollm2"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", str(shared / "fetch_smollm2.sh"), str(folder)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"SmolLM2 can't be had here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def record(base: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plot = tmp_path_factory.mktemp("plot") / "curves.svg"
    command = [sys.executable, str(REPOSITORY / "scripts" / "compare_engine.py"), "--model", str(base)]
    command += ["--dataset", str(shared / "data" / "codealpaca-6k.jsonl"), "--steps", str(NUM_STEPS)]
    command += ["--held-out", "8", "--learning-rate", "5e-4", "--at-once", str(os.cpu_count()), "--plot", str(plot)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert plot.stat().st_size > 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_model_learns_on_every_side(record: dict[str, Any]) -> None:
    for side in record["sides"].values():
        assert len(side["losses"]) == NUM_STEPS
        start, end = side["validation_losses"]
        assert end < start - 0.05


@pytest.mark.parametrize(
    ("of", "against"), [("engine", "plain"), ("packed", "engine"), ("packed", "plain"), ("plain_one_pass", "plain")]
)
def test_losses_differ_no_more_than_the_order_of_sums_makes_them(record: dict[str, Any], of: str, against: str) -> None:
    [found] = [each for each in record["comparisons"] if (each["of"], each["against"]) == (of, against)]
    print({key: value for key, value in found.items() if key not in {"of", "against"}})
    assert found["largest"] < MOST_APART
    assert max(found["validation_at_start_and_end"]) < MOST_APART


def test_losses_of_other_samples_are_further_apart(record: dict[str, Any]) -> None:
    losses = record["sides"]["plain"]["losses"]
    assert min(abs(one - other) for one, other in itertools.pairwise(losses)) > MOST_APART
