"""Limits as they are typed, and what passes them."""

from dataclasses import replace

import pytest

from dsft.core.errors import ConfigError
from dsft.core.units import GIB
from dsft.monitor.alerts import METRICS, Alert, judge, parse_alert
from dsft.monitor.sample import AlertSample, HostSample
from tests.monitor_readers import GPU, HOST, make_gpu, make_lost_gpu, make_sample


@pytest.mark.parametrize(
    ("text", "alert", "written"),
    [
        ("vram>95", Alert("vram", ">", 95.0), "vram>95"),
        ("  VRAM >= 95.5 ", Alert("vram", ">=", 95.5), "vram>=95.5"),
        ("free<.5", Alert("free", "<", 0.5), "free<0.5"),
        ("temp<=0", Alert("temp", "<=", 0.0), "temp<=0"),
        ("ecc>1234567", Alert("ecc", ">", 1234567.0), "ecc>1234567"),
        ("power>349.125", Alert("power", ">", 349.125), "power>349.125"),
    ],
)
def test_a_limit_is_read_and_written_so_that_it_can_be_read_again(text: str, alert: Alert, written: str) -> None:
    assert parse_alert(text) == alert
    assert str(alert) == written
    assert parse_alert(written) == alert


@pytest.mark.parametrize("text", ["vram", " Temp "])
def test_a_limit_that_the_shell_took_is_told_to_need_quotes(text: str) -> None:
    with pytest.raises(ConfigError, match="has no limit") as caught:
        parse_alert(text)
    assert f"--alert '{text.strip().lower()}>95'" in caught.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "", ">95", "vram>", "vram=95", "vram==95", "vram>>95", "vram>95%", "vram>-1", "vram>nan", "vram>1e3", "95<vram",
        "vram>95 temp>1", "vram!95",
    ],
)  # fmt: skip
def test_other_forms_are_refused_with_what_a_limit_is(text: str) -> None:
    with pytest.raises(ConfigError, match="is no limit") as caught:
        parse_alert(text)
    assert "--alert 'vram>95'" in caught.value.fix
    assert all(name in caught.value.fix for name in METRICS)


def test_an_unknown_metric_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="'vrma', which is not known") as caught:
        parse_alert("vrma>95")
    assert all(name in caught.value.fix for name in METRICS)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("vram", 100 - 100 * 13 / 24),  # what is reserved can't be had either
        ("free", 13),
        ("util", 90),
        ("bandwidth", 40),
        ("temp", 61),
        ("power", 280.4),
        ("ecc", 0),
        ("memtemp", None),
        ("fan", None),
    ],
)
def test_a_metric_of_a_gpu_is_read_from_it(metric: str, value: float | None) -> None:
    (judged,) = judge([Alert(metric, ">", 1e6)], make_sample(GPU))
    assert judged.value == (None if value is None else pytest.approx(value))
    assert judged.is_fired is (None if value is None else False)
    assert judged.gpu_index == 0


@pytest.mark.parametrize(("metric", "value"), [("cpu", 25), ("ram", 25), ("disk", 75), ("swap", 0)])
def test_a_metric_of_the_host_is_read_from_it_once(metric: str, value: float) -> None:
    (judged,) = judge([Alert(metric, ">", 24)], make_sample(GPU, make_gpu(1), host=HOST))
    assert (judged.gpu_index, judged.value, judged.is_fired) == (None, value, value > 24)


def test_a_disk_is_full_where_users_have_no_room_left() -> None:
    full = replace(HOST, disk_used_bytes=38 * GIB, disk_free_bytes=0, disk_total_bytes=40 * GIB)
    (judged,) = judge([Alert("disk", ">", 95)], make_sample(host=full))
    assert (judged.value, judged.is_fired) == (100, True)


def test_every_metric_is_named_in_the_help_with_its_unit() -> None:
    assert {name: metric.unit for name, metric in METRICS.items()} == (
        dict.fromkeys(("vram", "util", "bandwidth", "fan", "cpu", "ram", "swap", "disk"), "%")
        | {"free": "GiB", "temp": "°C", "memtemp": "°C", "power": "W", "ecc": "errors"}
    )
    assert all((metric.of_gpu is None) != (metric.of_host is None) for metric in METRICS.values())


@pytest.mark.parametrize(
    ("comparison", "fired"), [(">", [0, 0, 1]), (">=", [0, 1, 1]), ("<", [1, 0, 0]), ("<=", [1, 1, 0])]
)
def test_a_limit_itself_is_passed_where_it_says_so(comparison: str, fired: list[int]) -> None:
    alert = Alert("temp", comparison, 61)
    assert [alert.is_passed_by(value) for value in (60.9, 61.0, 61.1)] == list(map(bool, fired))


def test_each_limit_is_judged_on_each_gpu_in_order() -> None:
    sample = make_sample(make_gpu(0, temperature_c=90.0), make_lost_gpu(1), make_gpu(3), host=HOST)
    judged = judge([Alert("temp", ">", 85), Alert("cpu", ">", 85), Alert("free", "<", 14)], sample)
    assert judged == (
        AlertSample("temp>85", "temp", "°C", 0, 90.0, True),
        AlertSample("temp>85", "temp", "°C", 1, None, None),
        AlertSample("temp>85", "temp", "°C", 3, 61.0, False),
        AlertSample("cpu>85", "cpu", "%", None, 25.0, False),
        AlertSample("free<14", "free", "GiB", 0, 13.0, True),
        AlertSample("free<14", "free", "GiB", 1, None, None),
        AlertSample("free<14", "free", "GiB", 3, 13.0, True),
    )


def test_a_host_that_is_not_read_or_tells_nothing_is_unknown_not_well() -> None:
    alerts = [Alert(metric, "<", 101) for metric in ("cpu", "ram", "swap", "disk")]
    silent = replace(HOST, cpu_percent=None, memory_total_bytes=0, swap_total_bytes=None, disk_free_bytes=None)
    for host in (None, HostSample(), silent):
        assert [alert.is_fired for alert in judge(alerts, make_sample(host=host))] == [None] * 4


def test_a_full_card_is_at_100_and_one_without_a_total_is_unknown() -> None:
    full = make_gpu(memory_free_bytes=0, memory_used_bytes=23 * GIB)
    (judged,) = judge([Alert("vram", ">=", 100)], make_sample(full))
    assert (judged.value, judged.is_fired) == (100, True)
    (judged,) = judge([Alert("vram", ">", 0)], make_sample(make_gpu(memory_total_bytes=0)))
    assert judged.is_fired is None
