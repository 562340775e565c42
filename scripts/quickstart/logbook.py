"""What the quickstart shows and keeps: progress lines, plans, traces, pictures, the final table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_pipeweaver.ir.codec import problem_to_json, schedule_to_json, trace_to_json
from megatron_pipeweaver.ir.json_reader import write_whole
from megatron_pipeweaver.ir.plan_codec import plan_to_json
from megatron_pipeweaver.plugin.schedule import IterationReport
from megatron_pipeweaver.view.chrome import chrome_of_trace
from megatron_pipeweaver.view.layout import draw_schedule, draw_trace, schedule_of_trace
from megatron_pipeweaver.view.report import Progress, format_table, progress_line
from megatron_pipeweaver.view.svg import render_svg

PIPEWEAVER = "PipeWeaver"


class Logbook:
    """One rank's record of the run; files are written by the planning rank alone.

    Args:
        directory: where plans, traces and pictures go.
        iterations: how many iterations the run has.
        module: the module whose items are counted in the progress line.
    """

    def __init__(self, directory: Path, iterations: int, module: str) -> None:
        self._directory = directory
        self._iterations = iterations
        self._module = module
        self._makespans_ns: list[Mapping[str, int]] = []
        self._latest: IterationReport | None = None

    def record(self, report: IterationReport) -> None:
        """Keep `report`, and write its plan and trace where this rank made the plan."""
        self._latest = report
        if report.forward_only:
            return
        self._makespans_ns.append(
            {PIPEWEAVER: report.received.plan.plan.makespan_ns, **report.received.baselines}
        )
        if report.planned is not None:
            self._write(report)

    def progress(self, loss: float) -> str:
        """The line for the iteration that was recorded last."""
        report = self._latest
        assert report is not None
        assert report.batch is not None
        assert report.trace is not None
        return progress_line(
            Progress(
                iteration=len(self._makespans_ns),
                iterations=self._iterations,
                loss=loss,
                items=[one.count(self._module) for one in report.batch.microbatches],
                planned_ns=report.received.plan.plan.makespan_ns,
                measured_ns=report.trace.duration_ns,
                search_ns=report.received.search_ns,
                bubble=schedule_of_trace(report.trace).bubble(),
            )
        )

    def table(self) -> str:
        """Emulated time of all recorded iterations, by schedule, PipeWeaver first."""
        totals = {
            name: sum(one[name] for one in self._makespans_ns) for name in self._makespans_ns[0]
        }
        ours = totals[PIPEWEAVER]
        count = len(self._makespans_ns)
        return format_table(
            ["schedule of the same batches", "emulated ms / iteration", "PipeWeaver is faster by"],
            [
                [name, f"{total / count / 1e6:.3f}", f"{(total / ours - 1) * 100:.1f} %"]
                for name, total in sorted(totals.items(), key=lambda entry: entry[1])
            ],
        )

    def draw(self) -> None:
        """Draw the iteration that was recorded last: as planned, and as it ran."""
        report = self._latest
        if report is None or report.planned is None or report.trace is None:
            return
        planned = draw_schedule(
            report.planned.schedule,
            report.planned.problem,
            title=f"Iteration {len(self._makespans_ns)} as planned",
        )
        ran = draw_trace(
            report.trace,
            report.planned.problem,
            title=f"Iteration {len(self._makespans_ns)} as it ran",
        )
        write_whole(self._directory / "timeline-planned.svg", render_svg(planned))
        write_whole(self._directory / "timeline-measured.svg", render_svg(ran))
        write_whole(
            self._directory / "timeline-measured.chrome.json",
            chrome_of_trace(report.trace, report.planned.problem),
        )

    def _write(self, report: IterationReport) -> None:
        planned, trace = report.planned, report.trace
        assert planned is not None
        name = f"iteration-{len(self._makespans_ns):04d}"
        plans = self._directory / "plans"
        write_whole(plans / f"{name}.problem.json", problem_to_json(planned.problem))
        write_whole(plans / f"{name}.schedule.json", schedule_to_json(planned.schedule))
        write_whole(plans / f"{name}.plan.json", plan_to_json(planned.plan.plan))
        if trace is not None:
            path = self._directory / "traces" / f"{name}.trace.json"
            write_whole(path, trace_to_json(trace))
