"""Memory strategies of one layer: what it keeps, runs again, or sends to the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.work import OperatorClass, Queue, Subgraph, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """Which operators run again, and whether what they hand to others is dropped as well."""

    operators: frozenset[str] = frozenset()
    drops_outputs: bool = False
    whole: bool = False


_NORMS = frozenset({"norm1", "norm2", "norm_cross"})
_ACTIVATIONS = frozenset({"activation", "expert_activation", "shared_activation"})
_ATTENTIONS = frozenset(
    f"{prefix}attention{part}"
    for prefix in ("", "cross_")
    for part in ("", "_ring", "_scores", "_softmax", "_context")
) | {"repeat_key", "repeat_value", "repeat_cross_key", "repeat_cross_value"}

_SELECTIVE: Mapping[LayerStrategy, Recomputed] = MappingProxyType(
    {
        LayerStrategy.ATTENTION: Recomputed(operators=_ATTENTIONS),
        LayerStrategy.NORM: Recomputed(operators=_NORMS, drops_outputs=True),
        LayerStrategy.LIGHT: Recomputed(operators=_NORMS | _ACTIVATIONS, drops_outputs=True),
    }
)


def recomputed(strategy: LayerStrategy, graph: Subgraph) -> Recomputed:
    """The operators of `graph` that `strategy` runs again."""
    names = frozenset(one.name for one in graph.operators)
    if strategy is LayerStrategy.RECOMPUTE:
        return Recomputed(operators=names, drops_outputs=True, whole=True)
    found = _SELECTIVE.get(strategy, Recomputed())
    # Steps of one operator are called ``name:step``.
    chosen = frozenset(name for name in names if name.partition(":")[0] in found.operators)
    return replace(found, operators=chosen)


def weight_grads_apart(strategy: LayerStrategy, graph: Subgraph) -> frozenset[str]:
    """The operators of `graph` whose weight gradients can be left to an op of their own.

    Those of linears whose operands are on the device anyway: what was dropped or offloaded would
    be held once more until then. A projector's would hold more than it does otherwise, and what is
    no linear costs too little.
    """
    again = recomputed(strategy, graph)
    if again.whole or strategy is LayerStrategy.OFFLOAD or graph.name == "projector":
        return frozenset()
    dropping = again.operators if again.drops_outputs else frozenset()
    dropped = {name for one in graph.operators if one.name in dropping for name in one.outputs}
    return frozenset(
        one.name
        for one in graph.operators
        if one.kind is OperatorClass.MATMUL
        and one.queue is Queue.COMPUTE
        and dropped.isdisjoint(graph.bases.get(name, name) for name in one.saves)
    )


def held_tensors(graph: Subgraph, again: Recomputed) -> tuple[Tensor, ...]:
    """The tensors that stay on the device (or go to the host) from forward to backward.

    A kept tensor is dropped when an operator that runs again writes it and either nobody else
    keeps it or outputs are dropped; what such an operator reads stays.
    """
    if not again.operators:
        return graph.saved()
    bases = graph.bases
    producer = {name: one.name for one in graph.operators for name in one.outputs}
    keepers: dict[str, set[str]] = {}
    for one in graph.operators:
        for name in one.saves:
            keepers.setdefault(bases.get(name, name), set()).add(one.name)
    dropped = {
        name
        for name, by in keepers.items()
        if producer.get(name) in again.operators and (again.drops_outputs or by <= again.operators)
    }
    needed = {
        bases.get(name, name)
        for one in graph.operators
        if one.name in again.operators
        for name in one.inputs
        if producer.get(bases.get(name, name)) not in again.operators
    }
    return graph.stored((keepers.keys() - dropped) | needed)
