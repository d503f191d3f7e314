"""Limits as they are typed, and what passes them."""

from dataclasses import replace

import pytest

from dsft.core.errors import ConfigError
from dsft.core.units import GIB
from dsft.monitor.alerts import METRICS, Alert, judge, parse_alert
from dsft.monitor.sample import AlertSample, HostSample, MigSample
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


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("vram>90%", "vram>90"),
        ("temp > 80 C", "temp>80"),
        ("memtemp>=80°C", "memtemp>=80"),
        ("free<4GiB", "free<4"),
        ("power>400W", "power>400"),
        ("ecc>0 errors", "ecc>0"),
    ],
)
def test_a_limit_may_have_the_unit_of_its_metric(text: str, written: str) -> None:
    assert str(parse_alert(text)) == written


@pytest.mark.parametrize(
    ("text", "unit"),
    [("free<4GB", "GiB"), ("vram>20GiB", "%"), ("temp>80F", "°C"), ("power>1kW", "W"), ("cpu>1x", "%")],
)
def test_another_unit_is_refused_with_that_of_the_metric(text: str, unit: str) -> None:
    with pytest.raises(ConfigError, match=f"counts in {unit}"):
        parse_alert(text)


@pytest.mark.parametrize(
    "text", ["vram>100", "vram>150%", "util>=100.5", "cpu>101", "swap<0", "vram<0", "free<0", "power<0", "fan<0"]
)
def test_a_limit_that_nothing_can_pass_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="can never be passed"):
        parse_alert(text)


@pytest.mark.parametrize("text", ["vram>=100", "vram>99.9", "fan>110", "temp<0", "free<=0", "swap>0", "util<=0"])
def test_a_limit_at_the_very_edge_is_one(text: str) -> None:
    assert str(parse_alert(text)) == text


@pytest.mark.parametrize("text", ["memory>90", "mem>90"])
def test_memory_is_taken_for_vram_in_the_hint(text: str) -> None:
    with pytest.raises(ConfigError, match="which is not known") as caught:
        parse_alert(text)
    assert "is vram, in %" in caught.value.fix


@pytest.mark.parametrize("text", ["vram", " Temp "])
def test_a_limit_that_the_shell_took_is_told_to_need_quotes(text: str) -> None:
    with pytest.raises(ConfigError, match="has no limit") as caught:
        parse_alert(text)
    assert f"--alert '{text.strip().lower()}>95'" in caught.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "", ">95", "vram>", "vram=95", "vram==95", "vram>>95", "vram>95%%", "vram>-1", "vram>nan", "vram>1e3",
        "95<vram", "vram>95 temp>1", "vram!95",
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
        ("vram", 45.8),  # what is reserved can't be had either
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


def test_memory_is_judged_on_each_instance_where_mig_is_on_and_all_else_on_the_gpu() -> None:
    parts = tuple(
        MigSample(index, None, None, used * GIB, 0, (16 - used) * GIB, 16 * GIB) for index, used in ((0, 1), (2, 12))
    )
    divided = make_gpu(0, is_mig_enabled=True, migs=parts)
    judged = judge(
        [Alert("vram", ">", 50), Alert("free", "<", 10), Alert("temp", ">", 85)], make_sample(divided, make_gpu(1))
    )
    assert [(alert.alert, alert.gpu_index, alert.mig_index, alert.value, alert.is_fired) for alert in judged] == [
        ("vram>50", 0, 0, 6.2, False),
        ("vram>50", 0, 2, 75.0, True),
        ("vram>50", 1, None, 45.8, False),
        ("free<10", 0, 0, 15.0, False),
        ("free<10", 0, 2, 4.0, True),
        ("free<10", 1, None, 13.0, False),
        ("temp>85", 0, None, 61.0, False),
        ("temp>85", 1, None, 61.0, False),
    ]
    empty = make_gpu(0, is_mig_enabled=True)
    assert [alert.mig_index for alert in judge([Alert("vram", ">", 50)], make_sample(empty))] == [None]


@pytest.mark.parametrize(
    ("alert", "free_bytes", "told", "is_fired"),
    [
        (Alert("vram", ">", 60), 12 * GIB - 1, 50.0, False),
        (Alert("vram", ">", 50), 12 * GIB - 1, 50.000000004, True),  # never on the other side of the limit
        (Alert("vram", ">", 10), 7 * GIB + 12345, 70.8, True),
        (Alert("free", "<", 10), 7 * GIB + 12345678, 7.01, True),
    ],
)
def test_a_value_is_told_without_digits_that_tell_nothing(
    alert: Alert, free_bytes: int, told: float, is_fired: bool
) -> None:
    (judged,) = judge([alert], make_sample(make_gpu(memory_free_bytes=free_bytes)))
    assert (judged.value, judged.is_fired) == (told, is_fired)


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
