"""Small problems, schedules and files that the tests of `ir` share."""

from __future__ import annotations

from megatron_pipeweaver.ir.problem import Microbatch, OpKey, OpKind, Pass, Problem, Strategy
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow


def strategy(name: str = "keep", *, memory: int = 4, scale: int = 1) -> Strategy:
    return Strategy(
        name=name,
        forward_ns=10 * scale,
        backward_ns=12 * scale,
        weight_grad_ns=8 * scale,
        memory_bytes=memory,
    )


def stages(count: int) -> tuple[tuple[Strategy, ...], ...]:
    return ((strategy(), strategy("recompute", memory=1, scale=2)),) * count


def problem() -> Problem:
    """Two ranks; microbatch 0 has two vision passes (two segments), microbatch 1 has none."""
    vision = [
        Pass(module="vision", sub_microbatch=sub, stages=stages(4), p2p_latency_ns=5)
        for sub in range(2)
    ]
    language = Pass(
        module="language",
        sub_microbatch=0,
        after=(("vision", 0), ("vision", 1)),
        p2p_latency_ns=3,
        stages=stages(2),
    )
    text_only = Pass(module="language", sub_microbatch=0, p2p_latency_ns=3, stages=stages(2))
    return Problem(
        pipeline_size=2,
        memory_capacity_bytes=(100, 90),
        modules={"vision": 2, "language": 1},
        microbatches=(Microbatch(passes=(*vision, language)), Microbatch(passes=(text_only,))),
    )


def op(kind: str, stage: int, microbatch: int = 0, module: str = "language") -> OpKey:
    return OpKey(OpKind(kind), microbatch, module, 0, stage)


def schedule() -> Schedule:
    def row(kind: str, stage: int, start: int, end: int) -> ScheduledOp:
        return ScheduledOp(key=op(kind, stage), strategy="keep", start_ns=start, end_ns=end)

    return Schedule(
        problem_sha256="0" * 64,
        makespan_ns=50,
        lower_bound_ns=40,
        peak_memory_bytes=(4, 4),
        ranks=(
            (row("F", 0, 0, 10), row("B", 0, 38, 50)),
            (row("F", 1, 13, 23), row("B", 1, 23, 35), row("W", 1, 35, 43)),
        ),
    )


def trace() -> Trace:
    send = TraceRow(
        kind=TraceKind.SEND,
        key=op("F", 0),
        strategy="",
        start_ns=10,
        end_ns=12,
        peer=1,
        size_bytes=64,
    )
    run = TraceRow(kind=TraceKind.COMPUTE, key=op("F", 0), strategy="keep", start_ns=0, end_ns=10)
    return Trace(iteration=3, plan_sha256="ab", hosts=("a", "b"), ranks=((run, send), ()))
