r"""What stands between two iterations: from a rank's last action to its first one of the next.

    OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 GLOO_SOCKET_IFNAME=lo \
        python -m benchmarks.runtime.between -o benchmarks/runtime/results/between.csv

As many gloo ranks as the setup's pipeline has run `PipeWeaverSchedule` as it stands in training:
planner in its process, next batch read ahead, plan agreed, trace gathered, planner told, journal.
Only the iteration itself is not there: stages and transport do nothing, but for one nap that lasts
about as long as the planner needs. So all that is measured is what PipeWeaver does between two
iterations, by the clock and in processor time of the rank's main thread (more ranks than cores make
the first longer than it is where each rank has a core).
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from benchmarks.paced.cases import SETUPS, draw_batches, make_job, make_settings
from benchmarks.runtime.overhead import NoTransport
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.plan import Message, Plan, PlanPass
from megatron_pipeweaver.ir.problem import OpKey
from megatron_pipeweaver.planner.background import BackgroundConfig, BackgroundSource
from megatron_pipeweaver.planner.settings import PlannerSettings
from megatron_pipeweaver.plugin.communicators import Communicators
from megatron_pipeweaver.plugin.journal import Journal
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from megatron_pipeweaver.runtime.transfer import Pending
from megatron_pipeweaver.runtime.watchdog import StoreBoard, WatchConfig, Watchdog
from tests.distributed.harness import RankContext, run_on_ranks

_log = logging.getLogger("between")
_SEEN = 3  # iterations before the next batch is read ahead and planned in time

STEPS = {
    "_load": "batch taken and described",
    "_plan_for": "plan collected, shared, agreed",
    "_request_next": "next plan asked for",
    "_stages": "stages made ready",
    "_measured": "times gathered",
    "_report": "planner and journal told",
}
"""What the schedule function does between two iterations, by method."""


@dataclass(slots=True)
class Stopwatch:
    """Wall-clock and processor times (ns) of this rank, by what it does."""

    started: tuple[int, int] | None = None
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: list[dict[str, tuple[int, int]]] = field(default_factory=list)

    def begin(self) -> None:
        """The iteration's first action begins; what stood before it is over."""
        if self.started is not None:
            self.steps["all"] = _since(self.started)
            self.rows.append(self.steps)
            self.steps, self.started = {}, None

    def end(self) -> None:
        """The iteration's last action has ended."""
        self.started = _now()

    def add(self, step: str, taken: tuple[int, int]) -> None:
        """One step has taken so long."""
        self.steps[step] = taken


def _now() -> tuple[int, int]:
    return time.perf_counter_ns(), time.thread_time_ns()


def _since(begin: tuple[int, int]) -> tuple[int, int]:
    wall, processor = _now()
    return wall - begin[0], processor - begin[1]


class IdleStages:
    """Stages that compute nothing: the first forward naps for as long as an iteration lasts.

    Tensors have their planned shapes, and no memory.
    """

    def __init__(self, watch: Stopwatch, nap_s: float, plan: Plan) -> None:
        self._watch = watch
        self._nap_s = nap_s
        self._payloads = {one.key: one.payload for one in plan.passes}
        self._tensors: dict[tuple[int, ...], Tensor] = {}
        self.num_tokens = torch.zeros([], dtype=torch.int)

    def forward(
        self, one: PlanPass, op: OpKey, strategy: str, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """A tensor of the planned shape; before the first one, an iteration's nap."""
        self._watch.begin()
        nap_s, self._nap_s = self._nap_s, 0.0
        time.sleep(nap_s)
        payload = one.payload
        last = op.stage == one.stages - 1
        return self._tensor(payload.output_shape if last else payload.hidden_shape)

    def backward(
        self, one: PlanPass, op: OpKey, strategy: str, output_grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """One gradient per input."""
        if op.stage:
            return (self._tensor(one.payload.hidden_shape),)
        return tuple(self._tensor(self._payloads[producer].output_shape) for producer in one.after)

    def losses(self) -> list[Any]:
        """As on any rank but the last."""
        return []

    def _tensor(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._tensors:
            self._tensors[shape] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return self._tensors[shape]


class WatchedTransport(NoTransport):
    """No wire; tells the stopwatch when an iteration's actions end."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self._watch = watch

    def irecv(self, messages: Sequence[Message]) -> Sequence[Pending]:
        """There already; the first action of most ranks."""
        self._watch.begin()
        return super().irecv(messages)

    def finish(self) -> None:
        """Nothing is under way."""
        self._watch.end()


class TimedSchedule(PipeWeaverSchedule):
    """The schedule function as it is, its steps timed, its stages idle."""

    def __init__(self, watch: Stopwatch, nap_s: float, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._stopwatch = watch
        self._nap_s = nap_s
        for name in STEPS:
            setattr(self, name, self._timed(name, getattr(self, name)))

    def _timed(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            begin = _now()
            try:
                return step(*args, **named)
            finally:
                self._stopwatch.add(STEPS[name], _since(begin))

        return timed

    def _stages(self, context: Any, plan: Any, gauge: Any) -> Any:
        return IdleStages(self._stopwatch, self._nap_s, plan)


def run_ranks(
    ctx: RankContext,
    settings: PlannerSettings,
    batches: Sequence[BatchMetadata],
    nap_s: float,
) -> Any:
    """One iteration after another on one rank; its rows, and what became of the plans."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    everyone = tuple(range(ctx.size))
    source = BackgroundSource(settings, BackgroundConfig(wait_ns=60 * SECOND_NS))
    schedule = TimedSchedule(
        watch,
        nap_s,
        source,
        lambda one: one["metadata"],
        gather_traces=True,
        on_iteration=Journal(None, lambda name, number, iteration: None, lambda: 0).record,
    )
    schedule._communicators = Communicators(
        control=dist.new_group(list(everyone), backend="gloo"),  # type: ignore[arg-type]
        ahead=dist.new_group(list(everyone), backend="gloo"),  # type: ignore[arg-type]
        planning_rank=0,
        replicas=(everyone,),
        pipeline=dist.new_group(list(everyone), backend="gloo"),  # type: ignore[arg-type]
        pipeline_rank=ctx.rank,
        transport=WatchedTransport(watch),  # type: ignore[arg-type]
        watchdog=Watchdog(ctx.rank, StoreBoard(_get_default_store(), "benchmark"), WatchConfig()),
    )
    data = ({"metadata": one} for batch in batches for one in batch.microbatches)
    for number, batch in enumerate(batches[:-1]):
        ctx.note(f"iteration {number}")
        _iterate(schedule, data, len(batch.microbatches))
    counters = source.counters
    source.close()
    return watch.rows[_SEEN:], str(counters), counters.static


def _iterate(schedule: PipeWeaverSchedule, data: Iterator[Any], count: int) -> None:
    chunk = torch.nn.Module()
    chunk.config = SimpleNamespace(  # type: ignore[assignment]
        timers=None, no_sync_func=None, finalize_model_grads_func=None
    )
    schedule(
        forward_step_func=lambda *_: None,
        data_iterator=data,
        model=[chunk],
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        pg_collection=SimpleNamespace(pp=None),
    )


def measured(setup: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of one setup: medians of the planning rank, and of the slowest other one."""
    batches = draw_batches(setup, args.iterations + _SEEN + 2, args.microbatches, args.seed)
    job = make_job(setup, batches[:1])
    search = SearchConfig(
        time_budget_ns=round(args.search_s * SECOND_NS), threads=1, split_weight_grad=False
    )
    settings = make_settings(job, batches[:1], search)
    size = job.options.parallel.pipeline
    found = run_on_ranks(run_ranks, size, settings, batches, args.nap_s, deadline_s=600.0)
    _log.info("%s: %s", setup, found[0][1])
    rows = []
    others = max(range(1, size), key=lambda rank: _median(found[rank][0], "all", 0))
    for role, rank in (("planning", 0), ("another", others)):
        for step in [*STEPS.values(), "all"]:
            rows.append(
                {
                    "setup": setup,
                    "ranks": str(size),
                    "rank": role,
                    "step": step,
                    "wall_ms": f"{_median(found[rank][0], step, 0) / 1e6:.2f}",
                    "wall_most_ms": f"{_most(found[rank][0], step) / 1e6:.2f}",
                    "processor_ms": f"{_median(found[rank][0], step, 1) / 1e6:.2f}",
                    "static_plans": str(found[0][2]),
                }
            )
    return rows


def _median(rows: Sequence[dict[str, tuple[int, int]]], step: str, which: int) -> float:
    return median(one[step][which] for one in rows)


def _most(rows: Sequence[dict[str, tuple[int, int]]], step: str) -> int:
    return max(one[step][0] for one in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--search-s", type=float, default=0.5)
    parser.add_argument("--nap-s", type=float, default=4.0, help="how long an iteration lasts")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for setup in args.setups:
        rows += measured(setup, args)
        for row in rows:
            if row["setup"] == setup:
                _log.info("%s", row)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
