"""What is told of every iteration: files, and numbers in Megatron's own writers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import problem_to_json, schedule_to_json, trace_to_json
from megatron_pipeweaver.ir.json_reader import write_whole
from megatron_pipeweaver.ir.plan_codec import plan_to_json
from megatron_pipeweaver.planner.planner import PlanOrigin
from megatron_pipeweaver.plugin.schedule import IterationReport

_log = logging.getLogger(__name__)


class Journal:
    """Tells of every training iteration when it has run.

    Args:
        directory: where the first replica's planning rank writes problem, schedule, plan and
            trace of every iteration; `None` for no files.
        write: takes a name, a number and the iteration, as TensorBoard's writer does; `None` on
            ranks without one.
        iteration: the number of the iteration that runs.
    """

    def __init__(
        self,
        directory: Path | None,
        write: Callable[[str, float, int], None],
        iteration: Callable[[], int],
    ) -> None:
        self._directory = directory
        self._write = write
        self._iteration = iteration
        # Files take longer than what stands between two iterations may.
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    def record(self, report: IterationReport) -> None:
        """Tell of `report`; evaluation is passed over."""
        if report.forward_only:
            return
        iteration = self._iteration()
        for name, number in numbers_of(report).items():
            self._write(f"pipeweaver/{name}", number, iteration)
        if self._directory is not None and report.answer is not None:
            self._files.submit(self._write_files, self._directory, report, iteration)

    def close(self) -> None:
        """Returns when everything is written."""
        self._files.shutdown()

    @staticmethod
    def _write_files(directory: Path, report: IterationReport, iteration: int) -> None:
        try:
            write_files(directory / f"iteration-{iteration:07d}", report)
        except ConfigError as error:  # a full disk must not end the training that it tells of
            _log.warning("iteration %d is not written: %s; training goes on", iteration, error)
        except Exception:
            _log.exception("iteration %d is not written; training goes on", iteration)


def numbers_of(report: IterationReport) -> Mapping[str, float]:
    """What this rank knows of an iteration, by name.

    Returns:
        Planned and measured milliseconds, milliseconds of search, the idle share of planned and
        measured time, whether a static plan ran, and the images (items) of the leanest, the mean
        and the fullest microbatch.
    """
    received = report.received
    numbers: dict[str, float] = {
        "planned-ms": received.plan.plan.makespan_ns / 1e6,
        "measured-ms": report.measured_ns / 1e6,
        "search-ms": received.search_ns / 1e6,
        "planned-bubble": received.bubble_ppm / 1e6,
        "fallback": float(received.origin is PlanOrigin.STATIC),
    }
    if report.times is not None:
        numbers["measured-bubble"] = report.times.bubble()
    if report.batch is not None:
        counts = [sum(map(len, one.items.values())) for one in report.batch.microbatches]
        numbers |= {
            "items-per-microbatch-min": min(counts),
            "items-per-microbatch-mean": sum(counts) / len(counts),
            "items-per-microbatch-max": max(counts),
        }
    return numbers


def write_files(stem: Path, report: IterationReport) -> None:
    """Write problem, schedule, plan and trace beside each other, their names beginning alike.

    Nothing is written where only the plan is known.
    """
    planned = report.planned
    if planned is None:
        return
    files: dict[str, bytes] = {
        "problem": problem_to_json(planned.problem),
        "schedule": schedule_to_json(planned.schedule),
        "plan": plan_to_json(planned.plan.plan),
    }
    if (trace := report.trace) is not None:
        files["trace"] = trace_to_json(trace)
    for kind, data in files.items():
        write_whole(stem.with_name(f"{stem.name}.{kind}.json"), data)


def megatron_writer() -> Callable[[str, float, int], None]:
    """Writes into Megatron's TensorBoard and W&B writers, which the last rank alone has."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    def write(name: str, number: float, iteration: int) -> None:
        board: Any = get_tensorboard_writer()
        if board is not None:
            board.add_scalar(name, number, iteration)
        wandb: Any = get_wandb_writer()
        if wandb is not None:
            wandb.log({name: number}, iteration)

    return write
