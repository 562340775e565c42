"""Gradients out and weights in between replicas: alone, or hidden behind the pipeline.

    compute   | ... last B of chunk 1 | last B of chunk 0 |        optimizer | F chunk 0 | F chunk 1
    data link |                       | chunk 1 --------- | chunk 0 -        | 0 ------- | 1 -------

Hidden, as Megatron's ``--overlap-grad-reduce`` and ``--overlap-param-gather`` do: a chunk's
gradients leave when its last backward has ended, and its weights come in front of its first
forward of the next step, which runs the same schedule. That needs replicas that run their chunks
in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.problem import OpKind
from megatron_pipeweaver.ir.schedule import ScheduledOp
from megatron_pipeweaver.semu.memory import (
    OptimizerOptions,
    ParameterCount,
    chunk_parameters,
    replicas,
)
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.operators import collective_work
from megatron_pipeweaver.semu.work import OperatorClass, Queue, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkExchange:
    """What one trained chunk of a rank sends: `stage` of `module`."""

    module: str
    stage: int
    reduce_ns: int
    gather_ns: int

    def is_of(self, op: ScheduledOp) -> bool:
        """Whether `op` is one of this chunk."""
        return (op.key.module, op.key.stage) == (self.module, self.stage)


def rank_exchanges(
    model: ModelSpec, layout: ChunkLayout, costs: AnalyticCostModel, rule: OptimizerOptions
) -> tuple[tuple[ChunkExchange, ...], ...]:
    """The trained chunks of every rank with the time of their exchange, by virtual stage."""
    return tuple(
        tuple(
            ChunkExchange(
                module=place.module,
                stage=place.stage,
                reduce_ns=_reduce_ns(count, costs, rule),
                gather_ns=_gather_ns(count, costs, rule),
            )
            for place, count in zip(
                layout.chunks_of_rank(rank),
                chunk_parameters(model, layout, rank, costs.options),
                strict=True,
            )
            if not model.module(place.module).frozen
        )
        for rank in range(layout.pipeline_size)
    )


def _reduce_ns(count: ParameterCount, costs: AnalyticCostModel, rule: OptimizerOptions) -> int:
    kind = OperatorClass.REDUCE_SCATTER if rule.distributed else OperatorClass.ALL_REDUCE
    return _collective_ns(kind, count, costs.options.gradient_bytes, costs)


def _gather_ns(count: ParameterCount, costs: AnalyticCostModel, rule: OptimizerOptions) -> int:
    if not rule.distributed:
        return 0
    return _collective_ns(OperatorClass.ALL_GATHER, count, costs.options.element_bytes, costs)


def _collective_ns(
    kind: OperatorClass, count: ParameterCount, element_bytes: int, costs: AnalyticCostModel
) -> int:
    """Experts go round the replicas that hold the same ones, all else round all replicas."""
    ranks = replicas(costs.options)
    works: list[Work] = [
        collective_work(kind, size * element_bytes, among)
        for size, among in ((count.shared, ranks.shared), (count.experts, ranks.experts))
        if size
    ]
    return sum(costs.work_ns(work, kind, Queue.DATA_LINK) for work in works)


def reduced_ns(
    chunks: Sequence[ChunkExchange], ops: Sequence[ScheduledOp], *, overlap: bool
) -> int:
    """When the gradients of a rank have left, from the start of its schedule `ops`.

    Chunks without a backward are reduced last, as Megatron's finalisation does.
    """
    end = max((op.end_ns for op in ops), default=0)
    ready = {
        chunk: max(
            (op.end_ns for op in ops if chunk.is_of(op) and op.key.kind is not OpKind.F),
            default=end,
        )
        for chunk in chunks
    }
    link = 0
    for chunk in sorted(chunks, key=lambda one: ready[one]):
        link = max(link, ready[chunk] if overlap else end) + chunk.reduce_ns
    return max(link, end)


def gather_delay_ns(
    chunks: Sequence[ChunkExchange], ops: Sequence[ScheduledOp], *, overlap: bool
) -> int:
    """How much later a rank's schedule runs because its weights have to come in first."""
    if not overlap:
        return sum(chunk.gather_ns for chunk in chunks)
    end = max((op.end_ns for op in ops), default=0)
    first = {
        chunk: min(
            (op.start_ns for op in ops if chunk.is_of(op) and op.key.kind is OpKind.F),
            default=end,
        )
        for chunk in chunks
    }
    link = delay = 0
    for chunk in sorted(chunks, key=lambda one: first[one]):
        link += chunk.gather_ns
        delay = max(delay, link - first[chunk])
    return delay
