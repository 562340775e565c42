"""Memory strategies of one layer: what it keeps, runs again, or sends to the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.work import OperatorClass, Queue, Subgraph, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """Which operators run again, and whether what they hand to others is dropped as well.

    Those of a block run again together, whether all that they make is needed or not; the others
    one by one.
    """

    operators: frozenset[str] = frozenset()
    drops_outputs: bool = False
    blocks: tuple[frozenset[str], ...] = ()


_NORMS = frozenset({"norm1", "norm2", "norm_cross"})
_ACTIVATIONS = frozenset({"activation", "fc1:bias", "expert_activation", "weigh"})
_SELF_ATTENTION, _CROSS_ATTENTION = (
    frozenset(
        {f"{prefix}attention{part}" for part in ("", "_ring", "_scores", "_softmax", "_context")}
        | {f"repeat_{prefix}key", f"repeat_{prefix}value"}
    )
    for prefix in ("", "cross_")
)
_SHARED_EXPERTS = frozenset({"shared_fc1", "shared_activation", "shared_fc2"})
_EXPERTS = _SHARED_EXPERTS | {
    "enter_experts",
    "router",
    "route",
    "permute",
    "dispatch",
    "expert_fc1",
    "expert_activation",
    "weigh",
    "expert_fc2",
    "combine",
    "unpermute",
    "add_shared",
    "leave_experts",
}
_MLP = frozenset({"enter_mlp", "fc1", "activation", "fc2", "leave_mlp"})

_UP_PROJECTION = frozenset(
    {
        "query_up_norm",
        "enter_query_up",
        "query_up",
        "kv_up_norm",
        "enter_kv_up",
        "kv_up",
        "query_split",
        "rotary_query",
        "join_query",
        "turn_query",
        "kv_split",
        "rotary_key",
        "join_key",
        "copy_value",
        "turn_key_value",
    }
)
_LATENT_LINEARS = frozenset({"query_down", "query_up", "kv_down", "kv_up", "proj"})

_ONE_BY_ONE: Mapping[LayerStrategy, frozenset[str]] = MappingProxyType(
    {
        LayerStrategy.NORM: _NORMS,
        LayerStrategy.ACTIVATION: _ACTIVATIONS,
        LayerStrategy.LIGHT: _NORMS | _ACTIVATIONS,
    }
)
"""Operators whose outputs are dropped, whoever keeps them."""
_TOGETHER: Mapping[LayerStrategy, tuple[frozenset[str], ...]] = MappingProxyType(
    {
        LayerStrategy.ATTENTION: (_SELF_ATTENTION, _CROSS_ATTENTION),
        LayerStrategy.MLP: (_MLP, _EXPERTS),
        LayerStrategy.SHARED_EXPERTS: (_SHARED_EXPERTS,),
    }
)
"""Operators that are checkpointed together: what goes in and what comes out stays."""


def recomputed(strategy: LayerStrategy, graph: Subgraph) -> Recomputed:
    """The operators of `graph` that `strategy` runs again."""
    names = frozenset(one.name for one in graph.operators)
    if strategy is LayerStrategy.RECOMPUTE:
        return Recomputed(operators=names, drops_outputs=True, blocks=(names,))
    if strategy is LayerStrategy.UP_PROJECTION and "kv_up" in names:
        again = _steps(names, _UP_PROJECTION)
        return Recomputed(operators=again, drops_outputs=True, blocks=(again,))
    if strategy in _ONE_BY_ONE:
        return Recomputed(operators=_steps(names, _ONE_BY_ONE[strategy]), drops_outputs=True)
    steps = (_steps(names, block) for block in _TOGETHER.get(strategy, ()))
    blocks = tuple(block for block in steps if block)
    return Recomputed(operators=frozenset().union(*blocks), blocks=blocks)


def _steps(names: frozenset[str], chosen: frozenset[str]) -> frozenset[str]:
    """Those of `names` that are `chosen` or steps of a chosen operator, called ``name:step``."""
    return frozenset(name for name in names if {name, name.partition(":")[0]} & chosen)


def copied_back(graph: Subgraph, again: Recomputed) -> frozenset[str]:
    """Operators that run again one by one, whose output is copied to where others look for it."""
    if again.blocks or not again.drops_outputs:
        return frozenset()
    return frozenset(
        one.name
        for one in graph.operators
        if one.name in again.operators
        and any(
            one.outputs[0] in user.inputs
            for user in graph.operators
            if user.name not in again.operators
        )
    )


def checkpoints(strategy: LayerStrategy, graph: Subgraph) -> int:
    """How many parts of `graph` run again, each at once and under the random states of before."""
    again = recomputed(strategy, graph)
    return len(again.blocks) or len(copied_back(graph, again))


def kernels_again(strategy: LayerStrategy, graph: Subgraph) -> int:
    """How many kernels of the forward are launched again."""
    again = recomputed(strategy, graph).operators
    return sum(one.forward.kernels for one in graph.operators if one.name in again)


def weight_grads_apart(strategy: LayerStrategy, graph: Subgraph) -> frozenset[str]:
    """The operators of `graph` whose weight gradients can be left to an op of their own.

    Those of linears whose operands are on the device anyway: what was dropped or offloaded would
    be held once more until then. A projector's would hold more than it does otherwise, and what is
    no linear costs too little. Behind a dropped norm, experts run as one with the router, and
    latent attention as one.
    """
    again = recomputed(strategy, graph)
    if strategy is LayerStrategy.OFFLOAD or graph.name == "projector":
        return frozenset()
    names = frozenset(one.name for one in graph.operators)
    at_once = again.operators | (_EXPERTS if "norm2" in again.operators else frozenset())
    if "norm1" in again.operators and "kv_up" in names:
        at_once |= _LATENT_LINEARS
    dropping = again.operators if again.drops_outputs else frozenset()
    dropped = {name for one in graph.operators if one.name in dropping for name in one.outputs}
    return frozenset(
        one.name
        for one in graph.operators
        if one.kind is OperatorClass.MATMUL
        and one.name not in at_once
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
