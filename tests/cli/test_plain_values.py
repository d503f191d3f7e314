"""Options read without pydantic: the same values and errors as with it, and it does stay away."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from dsft.cli.app import COMMANDS, build
from dsft.cli.plain_values import read_plainly

TEXTS = (
    "5", "+5", "-5", "007", " 5", "5\n", "1_000", "5.0", "5.5", "1e3", "1e400", ".5", "5.", "", " ", "_1", "0x10", "٣",
    "٣.5", "nan", "-inf", "Infinity", "9" * 5000, "1" + "0" * 30, "true", "false", "off", "x", "日本", "\udcff", "a,b",
    ".", "no/such/path", "unreadable", "data.txt", "-",
)  # fmt: skip


def load(name: str) -> Any:
    context = typer.Context(build())
    _, command, _ = build().resolve_command(context, [name])
    return command


def read(parameter: Any, command: Any, value: Any) -> Any:
    """Return what a parameter makes of a value, or the error's words."""
    try:
        return repr(parameter.process_value(typer.Context(command), value))
    except typer.BadParameter as error:
        return (type(error), str(error))


@pytest.mark.parametrize("name", [entry.name for entry in COMMANDS])
def test_every_option_reads_the_same_with_and_without_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("x")
    Path("unreadable").touch(mode=0)
    plain = load(name)
    pairs = {parameter.name: parameter for parameter in load(name).params}
    num_plain = 0
    read_plainly(plain.params)
    for parameter in plain.params:
        num_plain += "get_runtime_param" in vars(parameter)
        own = pairs[parameter.name]
        parameter.callback = own.callback = None
        assert not hasattr(own, "get_runtime_param") or "get_runtime_param" not in vars(own)
        for text in TEXTS:
            forms: list[Any] = [text, [text], (text, "7"), [text, "x"]]
            for value in forms:
                assert read(parameter, plain, value) == read(own, plain, value), (parameter.name, value)
        others: list[Any] = [None, True, False, 3, 2.5, [], ()]
        for value in others:
            assert read(parameter, plain, value) == read(own, plain, value), (parameter.name, value)
    assert num_plain >= 5


@pytest.mark.parametrize(
    "settings",
    [{"min": 1}, {"max": 9, "clamp": True}, {"envvar": "X"}, {"parser": int}, {"exists": True}, {"resolve_path": True},
     {"dir_okay": False}, {"file_okay": False}, {"writable": True}, {"formats": ["%Y"]}],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_typer(settings: dict[str, Any]) -> None:
    app = typer.Typer()

    @app.command()
    def run(value: Annotated[int, typer.Option(**settings)] = 5) -> None: ...

    (parameter,) = (one for one in typer.main.get_command(app).params if one.name == "value")
    read_plainly([parameter])
    assert "get_runtime_param" not in vars(parameter)


class Odd:
    """A parameter of a typer that is built otherwise."""


@pytest.mark.parametrize(
    "attributes",
    [{}, {"get_runtime_param": None}, {"type_descriptor": None, "get_runtime_param": list},
     {"type_descriptor": Odd(), "get_runtime_param": list}],
)  # fmt: skip
def test_parameters_of_another_typer_stay_as_they_are(attributes: dict[str, Any]) -> None:
    parameter = Odd()
    vars(parameter).update(attributes)
    assert read_plainly([parameter]) == [parameter]
    assert vars(parameter) == attributes


def test_a_setting_that_nobody_knows_is_left_to_typer() -> None:
    app = typer.Typer()

    @app.command()
    def run(value: Annotated[int, typer.Option()] = 5) -> None: ...

    parameter: Any
    (parameter,) = (one for one in typer.main.get_command(app).params if one.name == "value")
    parameter.type_descriptor.parameter_info.rounds = True
    read_plainly([parameter])
    assert "get_runtime_param" not in vars(parameter)


def test_with_the_typer_that_is_installed_the_monitor_s_options_do_without_pydantic() -> None:
    code = (
        "import sys; from dsft.cli.app import main\n"
        "assert main(['monitor', '--once', '--json', '--no-cpu', '--gpu', '0', '--interval', '0.5', '--csv',"
        " '/no/such/folder/x', '--alert', 'temp>5']) != 0\n"
        "sys.exit('pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
