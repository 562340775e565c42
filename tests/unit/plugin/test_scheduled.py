"""What Megatron's arguments say of a training reaches the schedule that runs it."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

import pytest

from megatron_pipeweaver.planner.source import PlanCounters
from megatron_pipeweaver.plugin import training
from megatron_pipeweaver.plugin.arguments import PipeWeaverArguments


class NoSource:
    """Plans nothing."""

    counters = PlanCounters()

    def close(self) -> None:
        """There is nothing to end."""


class Family:
    """Describes nothing."""

    def describe(self, args: argparse.Namespace) -> None:
        """No microbatch."""


def test_waits_last_as_long_as_megatrons_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    for name, stand_in in {
        "plan_source": lambda ours, settings: NoSource(),
        "megatron_writer": lambda: None,
        "PipeWeaverSchedule": lambda *_, **named: given.update(named),
        "install": lambda schedule: None,
        "uninstall": lambda: None,
    }.items():
        monkeypatch.setattr(training, name, stand_in)
    args = argparse.Namespace(distributed_timeout_minutes=45)
    ours, family, settings = PipeWeaverArguments(), Family(), object()
    with training.scheduled(args, ours, settings, family):  # type: ignore[arg-type]
        assert given["wait_timeout"] == timedelta(minutes=45)
