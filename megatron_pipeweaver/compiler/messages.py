"""Which tensors cross rank borders, and their shapes: read by the lowering and by the verifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_pipeweaver.ir.plan import PassPayload
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassGraph, PassKey, dependencies


def remote_sources(graph: PassGraph, target: OpKey) -> Iterator[OpKey]:
    """The ops on other ranks whose tensors `target` needs, in the order of its dependencies."""
    for wait in dependencies(graph, target):
        if wait.carries_data and graph.rank_of(wait.op.stage) != graph.rank_of(target.stage):
            yield wait.op


def activation_of(source: OpKey, target: OpKey) -> OpKey:
    """The op whose stage made the activation that moves from `source` to `target`.

    For a gradient that is the stage it moves to: it has its activation's shape and type.
    """
    return source if source.kind is OpKind.F else target


def message_shape(
    payloads: Mapping[PassKey, PassPayload], source: OpKey, target: OpKey
) -> tuple[int, ...]:
    """The shape of what moves from `source` to `target`."""
    payload = payloads[activation_of(source, target).owner]
    return payload.hidden_shape if source.owner == target.owner else payload.output_shape
