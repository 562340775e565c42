"""Megatron's interleaved 1F1B: its order of ops, and how long it takes when nothing else costs.

The order is that of ``forward_backward_pipelining_with_interleaving`` (microbatches in groups of
the pipeline size, warm-up of ``2 (P - r - 1) + (V - 1) P`` forwards), re-implemented here to
choose Megatron's settings and to tell what its measured times should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ChunkOp(NamedTuple):
    """One forward or backward of one chunk: `stage` counts chunks along the whole model."""

    backward: bool
    microbatch: int
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCost:
    """One chunk's work on one microbatch.

    `latency_ns` is that of the message from this chunk to the next, and of the gradient back.
    """

    forward_ns: int
    backward_ns: int
    memory_bytes: int
    latency_ns: int


Costs = Sequence[Sequence[ChunkCost]]
"""By stage (chunk along the model), then by microbatch."""


def interleaved_order(
    pipeline_size: int, chunks: int, microbatches: int
) -> tuple[tuple[ChunkOp, ...], ...]:
    """What each rank runs, in order; `microbatches` is a multiple of `pipeline_size`."""
    table = [
        (microbatch, chunk)
        for start in range(0, microbatches, pipeline_size)
        for chunk in range(chunks)
        for microbatch in range(start, start + pipeline_size)
    ]
    ranks = []
    for rank in range(pipeline_size):
        forwards = [ChunkOp(False, one, pipeline_size * chunk + rank) for one, chunk in table]
        backwards = [
            ChunkOp(True, one, pipeline_size * (chunks - 1 - chunk) + rank) for one, chunk in table
        ]
        ahead = pipeline_size - rank - 1
        # One chunk per rank is plain 1F1B, which Megatron warms up with half as many.
        warm_up = ahead if chunks == 1 else 2 * ahead + (chunks - 1) * pipeline_size
        ahead = min(len(table), warm_up)
        steady = [op for pair in zip(forwards[ahead:], backwards, strict=False) for op in pair]
        rest = backwards[len(table) - ahead :]
        ranks.append((*forwards[:ahead], *steady, *rest))
    return tuple(ranks)


def emulated_ns(
    order: Sequence[Sequence[ChunkOp]], costs: Costs, ended: dict[ChunkOp, int] | None = None
) -> int:
    """When the last op ends if each starts as soon as its rank and its inputs are there.

    `ended` is filled with the end of every op, where it is given.
    """
    last_stage = len(costs) - 1
    ended = {} if ended is None else ended
    free = [0] * len(order)
    following = [0] * len(order)
    while any(index < len(ops) for index, ops in zip(following, order, strict=True)):
        moved = False
        for rank, ops in enumerate(order):
            while following[rank] < len(ops):
                op = ops[following[rank]]
                ready = _ready_ns(op, ended, costs, last_stage)
                if ready is None:
                    break
                cost = costs[op.stage][op.microbatch]
                length = cost.backward_ns if op.backward else cost.forward_ns
                free[rank] = ended[op] = max(free[rank], ready) + length
                following[rank] += 1
                moved = True
        if not moved:
            raise ValueError(f"ranks wait for each other; they stand at {following}")
    return max(free)


def _ready_ns(
    op: ChunkOp, ended: Mapping[ChunkOp, int], costs: Costs, last_stage: int
) -> int | None:
    """When the inputs of `op` are there, or `None` while they are not."""
    if not op.backward:
        if op.stage == 0:
            return 0
        source = ChunkOp(False, op.microbatch, op.stage - 1)
        latency = costs[op.stage - 1][op.microbatch].latency_ns
    elif op.stage == last_stage:
        source, latency = ChunkOp(False, op.microbatch, op.stage), 0
    else:
        source = ChunkOp(True, op.microbatch, op.stage + 1)
        latency = costs[op.stage][op.microbatch].latency_ns
    return ended[source] + latency if source in ended else None


def peak_bytes(order: Sequence[Sequence[ChunkOp]], costs: Costs) -> tuple[int, ...]:
    """The most activation memory that each rank holds."""
    peaks = []
    for ops in order:
        held = peak = 0
        for op in ops:
            memory = costs[op.stage][op.microbatch].memory_bytes
            held += -memory if op.backward else memory
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)
