"""What is told of every iteration, and what happens where it cannot be written."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import pytest

from megatron_pipeweaver.planner.planner import batch_digest
from megatron_pipeweaver.planner.source import PlanAnswer
from megatron_pipeweaver.planner.wire import decode, encode
from megatron_pipeweaver.plugin.journal import Journal
from megatron_pipeweaver.plugin.schedule import IterationReport
from tests.unit.planner.examples import batch_of, make_planner


def report() -> IterationReport:
    batch = batch_of(3, 0, 5)
    planned = make_planner().plan(batch)
    data = encode(planned, batch_digest(batch))
    return IterationReport(
        iteration=0,
        forward_only=False,
        received=decode(data),
        answer=PlanAnswer(data=data, received=None, planned=lambda: planned),
        batch=batch,
        measured_ns=5_000_000,
        times=None,
    )


def test_problem_schedule_and_plan_stand_beside_each_other(tmp_path: Path) -> None:
    numbers: dict[str, float] = {}
    journal = Journal(tmp_path, lambda name, value, _: numbers.update({name: value}), lambda: 7)
    journal.record(report())
    journal.close()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        f"iteration-0000007.{kind}.json" for kind in ("plan", "problem", "schedule")
    ]
    assert numbers["pipeweaver/measured-ms"] == 5.0


def test_training_goes_on_where_the_disk_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    journal = Journal(tmp_path, lambda name, *_: told.append(name), lambda: 7)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            journal.record(report())
            journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "iteration 7 is not written" in caplog.text
    assert "training goes on" in caplog.text
    assert told, "numbers do not need the disk"
    assert not list(tmp_path.iterdir())
