"""A stand-in for the training run, so that tests of the command line need no torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsft.cli.app import main
from dsft.core.config.load import ResolvedConfig
from dsft.train.events import EventSink

Run = Callable[..., Any]


class FakeRun:
    """Takes the place of `dsft.train.run`; keeps what it was called with."""

    def __init__(self) -> None:
        self.resolved: ResolvedConfig | None = None
        self.is_resumed = False
        self.is_overwriting = False
        self.behave: Callable[[EventSink], Any] = lambda sink: None

    def run_train(self, resolved: ResolvedConfig, *, resume: bool, overwrite: bool, sink: EventSink) -> Any:
        self.resolved, self.is_resumed, self.is_overwriting = resolved, resume, overwrite
        return self.behave(sink)

    def dry_run(self, resolved: ResolvedConfig, *, sink: EventSink) -> Any:
        self.resolved = resolved
        return self.behave(sink)


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRun:
    """Replace the training run and its summary by nothing, in an empty folder."""
    fake = FakeRun()
    module, summary = ModuleType("dsft.train.run"), ModuleType("dsft.cli.views.summary")
    vars(module).update(run_train=fake.run_train, dry_run=fake.dry_run)
    vars(summary).update(render_summary=lambda result: "SUMMARY")
    monkeypatch.setitem(sys.modules, "dsft.train.run", module)
    monkeypatch.setitem(sys.modules, "dsft.cli.views.summary", summary)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def train(fake_run: FakeRun) -> Callable[..., ResolvedConfig]:
    """Run `dsft train` with the stand-in and return the configuration it was given."""

    def run(*args: str) -> ResolvedConfig:
        fake_run.resolved = None
        fake_run.behave = lambda sink: None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsft.cli.train.make_record", lambda message: {})
            assert main(["train", "--quiet", *args]) == 0
        assert fake_run.resolved is not None
        return fake_run.resolved

    return run
