r"""PipeWeaver's executor against Megatron's own functions on one and the same schedule.

    python -m benchmarks.runtime.equal -o benchmarks/runtime/results/equal.csv

Four gloo ranks run plain and interleaved 1F1B, once by Megatron's function and once as a plan
whose ranks run their ops in just that order, by turns. Stages wait a few milliseconds, so that
what differs is what a schedule function costs around them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from benchmarks.paced.cases import TINY, PlannedBatch
from benchmarks.paced.interleaving import ChunkCost, ChunkOp, Costs, emulated_ns, interleaved_order
from benchmarks.paced.megatron import MegatronSetting
from benchmarks.paced.pace import Pace, measured_margin_ns
from benchmarks.paced.ranks import megatron_chunks, run_megatron, run_planned
from benchmarks.turns import Row, timed, told_medians, write_rows
from megatron_pipeweaver.compiler.lowering import compile_plan
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.ir.plan import PassPayload
from megatron_pipeweaver.ir.problem import (
    Microbatch,
    OpKey,
    OpKind,
    Pass,
    PassKey,
    Problem,
    Strategy,
)
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import megatron_ranks

_log = logging.getLogger("equal")

RANKS = 4
SYSTEMS = ("pipeweaver", "megatron", "emulated")
MODULE = "language"


def equal_plan(costs: Costs, order: Sequence[Sequence[ChunkOp]], chunks: int) -> PlannedBatch:
    """The plan whose ranks run their ops in `order`."""
    count = len(costs[0])
    problem = Problem(
        pipeline_size=RANKS,
        memory_capacity_bytes=(0,) * RANKS,
        modules={MODULE: chunks},
        microbatches=tuple(
            Microbatch(
                passes=(
                    Pass(
                        module=MODULE,
                        sub_microbatch=0,
                        stages=tuple((_strategy(row[index]),) for row in costs),
                    ),
                )
            )
            for index in range(count)
        ),
    )
    duration = emulated_ns(order, costs)
    schedule = Schedule(
        problem_sha256="",
        makespan_ns=duration,
        lower_bound_ns=0,
        peak_memory_bytes=(0,) * RANKS,
        # The compiler reads the order of a rank's ops, and their times to put ranks in one order.
        ranks=tuple(_timed_ops(order, costs)),
    )
    payload = PassPayload(item_start=0, item_stop=1, hidden_shape=TINY, output_shape=TINY)
    payloads = {PassKey(index, MODULE, 0): payload for index in range(count)}
    plan = compile_plan(problem, schedule, payloads, {MODULE: "float64"})
    return PlannedBatch(plan=verify(plan), problem=problem, emulated_ns=duration, lower_bound_ns=0)


def _strategy(cost: ChunkCost) -> Strategy:
    return Strategy(
        name="keep",
        forward_ns=cost.forward_ns,
        backward_ns=cost.backward_ns,
        weight_grad_ns=0,
        memory_bytes=0,
    )


def _timed_ops(order: Sequence[Sequence[ChunkOp]], costs: Costs) -> list[tuple[ScheduledOp, ...]]:
    """Each rank's ops with the times at which they would run."""
    ended: dict[ChunkOp, int] = {}
    emulated_ns(order, costs, ended)
    return [
        tuple(
            ScheduledOp(
                key=OpKey(
                    OpKind.B if op.backward else OpKind.F, op.microbatch, MODULE, 0, op.stage
                ),
                strategy="keep",
                start_ns=ended[op] - _length_ns(op, costs),
                end_ns=ended[op],
            )
            for op in ops
        )
        for ops in order
    ]


def _length_ns(op: ChunkOp, costs: Costs) -> int:
    cost = costs[op.stage][op.microbatch]
    return cost.backward_ns if op.backward else cost.forward_ns


def compare(ctx: RankContext, forward_us: int, microbatches: int, repeats: int) -> list[Row]:
    """Rank 0's rows: (schedule, repeat, PipeWeaver's ns, Megatron's ns, emulated ns)."""
    torch.set_num_threads(1)
    pace = Pace(numerator=1, denominator=1, margin_ns=measured_margin_ns())
    transport = ProcessGroupTransport(
        [range(RANKS)], device=torch.device("cpu"), timeout=timedelta(seconds=60)
    )
    cost = ChunkCost(
        forward_ns=forward_us * 1000,
        backward_ns=2 * forward_us * 1000,
        memory_bytes=0,
        latency_ns=0,
    )
    rows: list[Row] = []
    for name, chunks in (("1f1b", 1), ("interleaved", 2)):
        costs = [[cost] * microbatches for _ in range(RANKS * chunks)]
        order = interleaved_order(RANKS, chunks, microbatches)
        planned = equal_plan(costs, order, chunks)
        setting = MegatronSetting(
            name=name,
            chunks=chunks,
            recomputed=0,
            layers=(),
            costs=(costs,),
            emulated_ns=(planned.emulated_ns,),
        )
        with megatron_ranks(RANKS, chunks if chunks > 1 else None):
            for repeat in range(repeats):
                ctx.note(f"{name} {repeat}: PipeWeaver")
                ours = timed(partial(run_planned, ctx.rank, pace, planned, transport))
                ctx.note(f"{name} {repeat}: Megatron")
                chunk_list = megatron_chunks(ctx, pace, setting, 0)
                theirs = timed(partial(run_megatron, chunk_list))
                rows.append((name, repeat, ours, theirs, planned.emulated_ns))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forward-us", type=int, default=4000)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = run_on_ranks(
        compare,
        RANKS,
        args.forward_us,
        args.microbatches,
        args.repeats,
        deadline_s=240.0,
        environment={"TORCHDYNAMO_DISABLE": "1"},
    )[0]
    write_rows(args.output, "schedule", SYSTEMS, rows)
    told_medians(SYSTEMS, rows, _log)


if __name__ == "__main__":
    main()
