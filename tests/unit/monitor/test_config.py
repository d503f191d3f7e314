"""What a watch may be asked for."""

import math
import re
from typing import Any

import pytest

from dsft.core.errors import ConfigError
from dsft.monitor.alerts import parse_alert
from dsft.monitor.config import MonitorConfig


@pytest.mark.parametrize("interval_s", [0.1, 1, 86_400.0])
def test_intervals_from_a_tenth_of_a_second_to_a_day_are_taken(interval_s: float) -> None:
    assert MonitorConfig(interval_s=interval_s).interval_s == interval_s


@pytest.mark.parametrize("interval_s", [0.0999, 0.05, 0.0, -1.0, 86_401.0, 1e12, math.nan, math.inf, -math.inf])
def test_other_intervals_are_refused(interval_s: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--interval is {interval_s:g}.")) as caught:
        MonitorConfig(interval_s=interval_s)
    assert "0.1" in caught.value.fix


@pytest.mark.parametrize("duration_s", [0.0, -5.0, math.nan, math.inf])
def test_durations_that_are_none_are_refused(duration_s: float) -> None:
    with pytest.raises(ConfigError, match=f"--duration is {duration_s:g}"):
        MonitorConfig(duration_s=duration_s)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"is_once": True, "duration_s": 3.0}, "--once and --duration"),
        ({"gpus": ("0", "")}, "--gpu has an empty place"),
        ({"gpus": ("",)}, "--gpu has an empty place"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        MonitorConfig(**settings)
    assert caught.value.fix


def test_a_limit_on_the_host_needs_the_host() -> None:
    with pytest.raises(ConfigError, match="'ram>5' is about the host, and --no-cpu"):
        MonitorConfig(reads_host=False, alerts=(parse_alert("vram>5"), parse_alert("ram>5")))
    assert MonitorConfig(alerts=(parse_alert("ram>5"),)).alerts
