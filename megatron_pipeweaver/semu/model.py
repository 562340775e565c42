"""SEMU as a cost model: stage pairs emulated from operator subgraphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.semu.cost import CostRule, OperatorCosts
from megatron_pipeweaver.semu.devices import DeviceProfile
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.reuse import Reuse
from megatron_pipeweaver.semu.stages import Part, stage_parts
from megatron_pipeweaver.semu.work import OperatorClass, Phase, Queue, Subgraph, Work

KEEP = "keep"
"""Every activation stays until its backward."""
RECOMPUTE = "recompute"
"""Layers keep their input alone and run their forward again in front of their backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCost:
    """One subgraph on one rank: times, what it keeps, and what its input alone takes."""

    forward_ns: int
    input_grad_ns: int
    weight_grad_ns: int
    saved_bytes: int
    input_bytes: int


class AnalyticCostModel:
    """Times and memory from the roofline; a `CostModel`.

    Args:
        profile: the device that every rank is.
        options: implementation, element types and parallel sizes.
        rules: a user's own latencies by operator class.
        reuse: where results are kept; one of its own if none is given.
    """

    __slots__ = ("_costs", "options", "profile", "reuse")

    def __init__(
        self,
        profile: DeviceProfile,
        options: RunOptions,
        rules: Mapping[OperatorClass, CostRule] | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.profile = profile
        self.options = options
        self.reuse = Reuse() if reuse is None else reuse
        scale_out = set()
        if options.parallel.world_size > profile.scale_up_ranks:
            scale_out |= {Queue.PIPELINE_LINK, Queue.DATA_LINK}
        if options.parallel.tensor > profile.scale_up_ranks:
            scale_out.add(Queue.TENSOR_LINK)
        self._costs = OperatorCosts(profile, rules, frozenset(scale_out))

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        """``keep`` and, where the stage has layers, ``recompute``, of one stage pair on one rank.

        A frozen module's weight gradient takes no time; whether it has a backward at all is the
        pass's affair. Times in nanoseconds, memory in bytes.
        """
        return self.reuse.get(
            ("stage", module, stage, load), lambda: self._strategies(module, stage, load)
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """Time of a message of `size_bytes` between neighbouring pipeline ranks."""
        return self._costs.work_ns(
            Work(network_bytes=size_bytes, steps=1), OperatorClass.SEND, Queue.PIPELINE_LINK
        )

    def graph_cost(self, graph: Subgraph) -> GraphCost:
        """Times and memory of one subgraph."""
        phases = {
            phase: sum(self._costs.latency_ns(one, phase) for one in graph.operators)
            for phase in Phase
        }
        return GraphCost(
            forward_ns=phases[Phase.FORWARD],
            input_grad_ns=phases[Phase.INPUT_GRAD],
            weight_grad_ns=phases[Phase.WEIGHT_GRAD],
            saved_bytes=graph.saved_bytes,
            input_bytes=graph.tensors[0].size_bytes if graph.tensors else 0,
        )

    def _strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        parts = stage_parts(module, stage, load, self.options)
        costs = [(part, self.graph_cost(part.graph)) for part in parts]
        keep = Strategy(
            name=KEEP,
            forward_ns=sum(part.copies * cost.forward_ns for part, cost in costs),
            backward_ns=sum(part.copies * cost.input_grad_ns for part, cost in costs),
            weight_grad_ns=(
                0
                if module.frozen
                else sum(part.copies * cost.weight_grad_ns for part, cost in costs)
            ),
            memory_bytes=self._held(module, load, costs, recompute=False),
        )
        if not stage.layers:
            return (keep,)
        again = sum(part.copies * cost.forward_ns for part, cost in costs if part.is_layer)
        recompute = Strategy(
            name=RECOMPUTE,
            forward_ns=keep.forward_ns,
            backward_ns=keep.backward_ns + again,
            weight_grad_ns=keep.weight_grad_ns,
            memory_bytes=self._held(module, load, costs, recompute=True),
        )
        return keep, recompute

    def _held(
        self,
        module: ModuleSpec,
        load: Load,
        costs: list[tuple[Part, GraphCost]],
        *,
        recompute: bool,
    ) -> int:
        """Bytes from the forward to the backward; at least the tensor that the stage is given."""
        held = sum(
            part.copies * (cost.input_bytes if recompute and part.is_layer else cost.saved_bytes)
            for part, cost in costs
        )
        return max(held, load.tokens * module.hidden_size * self.options.element_bytes)
