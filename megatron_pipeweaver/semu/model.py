"""SEMU as a cost model: stage pairs emulated from operator subgraphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields, replace

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies
from megatron_pipeweaver.semu.cost import CostRule, OperatorCosts
from megatron_pipeweaver.semu.devices import DeviceProfile
from megatron_pipeweaver.semu.graph import Memory, Store, emulate
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.operators import host_copy
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.reuse import DiskCache, Reuse, content_key, source_digest
from megatron_pipeweaver.semu.stage_costs import GraphCost, StageCosts, StagePart
from megatron_pipeweaver.semu.stages import Part, canonical_stage, stage_parts
from megatron_pipeweaver.semu.strategies import (
    checkpoints,
    held_tensors,
    kernels_again,
    recomputed,
    weight_grads_apart,
)
from megatron_pipeweaver.semu.training import backward_graph, forward_graph
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Phase, Queue, Subgraph, Work

DEFAULT_STRATEGIES = (LayerStrategy.KEEP, LayerStrategy.RECOMPUTE)
_COST_FIELDS = tuple(field.name for field in fields(GraphCost))
_MEMORY = Memory(0, Store.DEVICE)


class AnalyticCostModel:
    """Times and memory from emulated operator graphs; a `CostModel`.

    Args:
        profile: the device that every rank is.
        options: implementation, element types and parallel sizes.
        rules: a user's own latencies by operator class.
        reuse: where results are kept; one of its own if none is given.
        strategies: the candidates for a stage's layers, all of them alike.
        disk: subgraphs of earlier runs; not together with `rules`, whose content is unknown.

    Raises:
        ConfigError: `disk` and `rules` are both given.
    """

    __slots__ = (
        "_content",
        "_context",
        "_costs",
        "_disk",
        "options",
        "profile",
        "reuse",
        "strategies",
    )

    def __init__(
        self,
        profile: DeviceProfile,
        options: RunOptions,
        *,
        rules: Mapping[OperatorClass, CostRule] | None = None,
        reuse: Reuse | None = None,
        strategies: tuple[LayerStrategy, ...] = DEFAULT_STRATEGIES,
        disk: DiskCache | None = None,
    ) -> None:
        if disk is not None and rules:
            raise ConfigError("cost model: own latency rules cannot be cached on disk; drop one")
        self.profile = profile
        self.options = options
        self.reuse = Reuse() if reuse is None else reuse
        self.strategies = strategies
        self._costs = OperatorCosts(profile, rules, _scale_out_queues(profile, options))
        self._disk = disk
        self._content = "" if disk is None else content_key(source_digest(), profile, options)
        # Models that share a `Reuse` share results only where all of this is equal.
        self._context = self.reuse.context((profile, options, strategies, rules))

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        """The candidates of one stage pair on one rank; a stage without layers has ``keep`` alone.

        A frozen module's weight gradient takes no time; whether it has a backward at all is the
        pass's affair. Times in nanoseconds, memory in bytes.
        """
        stage = canonical_stage(module, stage)
        return self.reuse.get(
            (self._context, "stage", module, stage, load),
            lambda: self._stage_strategies(module, stage, load),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """Time of a message of `size_bytes` between neighbouring pipeline ranks."""
        work = Work(network_bytes=size_bytes, steps=1)
        return self.work_ns(work, OperatorClass.SEND, Queue.PIPELINE_LINK)

    def work_ns(self, work: Work, kind: OperatorClass, queue: Queue = Queue.COMPUTE) -> int:
        """Latency of `work` on this device, by a rule for its kind too; 0 where there is none."""
        one = Operator(name=kind.value, kind=kind, inputs=(), outputs=(), forward=work, queue=queue)
        return self._costs.latency_ns(one, Phase.FORWARD)

    def working_bytes(self, module: ModuleSpec, stage: StageShape, load: Load) -> int:
        """Device memory that a stage needs for a while, beyond what its strategies hold.

        While layers work, what stands behind them (projector, head) is yet to come, or is done;
        the gradient that came into the stage is held to the end.
        """
        parts = stage_parts(module, stage, load)
        most = behind = 0
        came = self._graph(parts[-1]).output_bytes if parts else 0
        for number, part in enumerate(reversed(parts)):
            strategies = self.strategies if part.is_layer else DEFAULT_STRATEGIES[:1]
            costs = [self.part_cost(part, strategy) for strategy in strategies]
            working = max(one.working_bytes for one in costs) - behind
            # Of equal layers in a row, the last one works on what came in; another one's is done.
            done = min(one.held_bytes for one in costs) if part.copies > 1 else came
            most = max(most, working + (came if number else max(0, came - done)))
            behind += 0 if part.is_layer else part.copies * costs[0].held_bytes
        return most

    def exposed_ns(
        self, module: ModuleSpec, stage: StageShape, load: Load, strategy: str, *, backward: bool
    ) -> int:
        """Time in which a stage's forward, or its backward in one piece, waits for other ranks.

        Only links within the stage count (tensor, context and expert parallelism), not messages
        between stages.
        """
        stage = canonical_stage(module, stage)
        both = self.reuse.get(
            (self._context, "exposed", module, stage, load, strategy),
            lambda: self._exposed_both_ns(stage_parts(module, stage, load), stage.layers, strategy),
        )
        return both[backward]

    def _exposed_both_ns(
        self, parts: tuple[Part, ...], layers: int, strategy: str
    ) -> tuple[int, int]:
        choice = iter(layer_strategies(strategy, layers))
        forward_ns = backward_ns = 0
        for part in parts:
            for _ in range(part.copies):
                cost = self.part_cost(part, next(choice) if part.is_layer else LayerStrategy.KEEP)
                forward_ns += cost.exposed_forward_ns
                backward_ns += cost.exposed_backward_ns
        return forward_ns, backward_ns

    def part_cost(self, part: Part, strategy: LayerStrategy = LayerStrategy.KEEP) -> GraphCost:
        """Times and memory of one copy of a part under one strategy."""
        return self.reuse.get(
            (self._context, "part", part.make, part.arguments, part.splits_context, strategy),
            lambda: self._found_cost(part, strategy),
        )

    def _found_cost(self, part: Part, strategy: LayerStrategy) -> GraphCost:
        """From disk, where it is there."""
        if self._disk is None:
            return self.graph_cost(self._graph(part), strategy)
        key = content_key(
            self._content, part.make.__name__, part.arguments, part.splits_context, strategy
        )
        numbers = self._disk.get(key, lambda: astuple(self.graph_cost(self._graph(part), strategy)))
        return GraphCost(**dict(zip(_COST_FIELDS, numbers, strict=True)))

    def _graph(self, part: Part) -> Subgraph:
        return self.reuse.get(
            (self._context, "graph", part.make, part.arguments, part.splits_context),
            lambda: part.build(self.options),
        )

    def latency_ns(self, graph: Subgraph, phase: Phase) -> int:
        """Sum of the latencies of one phase of all operators, as if nothing ran side by side."""
        return sum(self._costs.latency_ns(one, phase) for one in graph.operators)

    def graph_cost(
        self, graph: Subgraph, strategy: LayerStrategy = LayerStrategy.KEEP
    ) -> GraphCost:
        """Times and memory of one subgraph under one strategy, emulated anew."""
        again = recomputed(strategy, graph)
        latency = self._costs.latency_ns
        forward_nodes = forward_graph(graph, latency, again)
        backward_nodes = backward_graph(graph, latency, again)
        forward, backward = emulate(forward_nodes), emulate(backward_nodes)
        # A backward in one piece takes what its graph takes; a weight gradient that runs apart
        # takes its operators' time.
        apart = weight_grads_apart(strategy, graph)
        weight_grad_ns = at_once_ns = 0
        for one in graph.operators:
            if one.queue is Queue.COMPUTE:
                took_ns = latency(one, Phase.WEIGHT_GRAD)
                weight_grad_ns += took_ns if one.name in apart else 0
                at_once_ns += 0 if one.name in apart else took_ns
        weight_grad_ns = min(weight_grad_ns, backward.duration_ns)
        at_once_ns = min(at_once_ns, backward.duration_ns - weight_grad_ns)
        held = sum(one.size_bytes for one in held_tensors(graph, again))
        to_host = held if strategy is LayerStrategy.OFFLOAD else 0
        return GraphCost(
            forward_ns=forward.duration_ns,
            backward_ns=backward.duration_ns - weight_grad_ns,
            weight_grad_ns=weight_grad_ns,
            weight_at_once_ns=at_once_ns,
            held_bytes=held - to_host,
            host_bytes=to_host,
            copy_ns=self._copy_ns(to_host),
            exposed_forward_ns=forward.duration_ns - forward_nodes.busy_ns(Queue.COMPUTE),
            exposed_backward_ns=backward.duration_ns - backward_nodes.busy_ns(Queue.COMPUTE),
            forward_peak_bytes=forward.peak_bytes(_MEMORY),
            backward_peak_bytes=backward.peak_bytes(_MEMORY),
        )

    def _copy_ns(self, size_bytes: int) -> int:
        if not size_bytes:
            return 0
        return self._costs.latency_ns(host_copy(size_bytes), Phase.FORWARD)

    def _stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        costs = self._stage_costs(module, stage, load)
        candidates = self.strategies if stage.layers else DEFAULT_STRATEGIES[:1]
        return tuple(costs.uniform(strategy) for strategy in candidates)

    def layer_strategies(
        self,
        module: ModuleSpec,
        stage: StageShape,
        load: Load,
        strategies: Sequence[LayerStrategy] = tuple(LayerStrategy),
    ) -> StageCosts:
        """A stage pair on one rank, layer by layer: each one's costs under each of `strategies`.

        Times are exact FLOPs and bytes through the roofline, as in `stage_strategies`; a mixture
        is made by `StageCosts.strategy`.
        """
        stage = canonical_stage(module, stage)
        candidates = tuple(strategies)
        return self.reuse.get(
            (self._context, "layers", module, stage, load, candidates),
            lambda: self._stage_costs(module, stage, load, candidates),
        )

    def _stage_costs(
        self,
        module: ModuleSpec,
        stage: StageShape,
        load: Load,
        strategies: tuple[LayerStrategy, ...] | None = None,
    ) -> StageCosts:
        candidates = self.strategies if strategies is None else strategies
        size = self.options.element_bytes
        return StageCosts(
            parts=tuple(
                self._stage_part(part, candidates) for part in stage_parts(module, stage, load)
            ),
            context_bytes=sum(load.context_lengths) * (module.layer.context_size or 0) * size,
            frozen=module.frozen,
        )

    def _stage_part(self, part: Part, strategies: tuple[LayerStrategy, ...]) -> StagePart:
        if not part.is_layer:
            strategies = (LayerStrategy.KEEP,)
        return StagePart(
            copies=part.copies,
            is_layer=part.is_layer,
            costs={one: self._framed_cost(part, one) for one in strategies},
        )

    def _framed_cost(self, part: Part, strategy: LayerStrategy) -> GraphCost:
        """The cost of a part, with what the framework makes of its operators."""
        cost = self.part_cost(part, strategy)
        profile = self.profile
        if not profile.has_layer_factors:
            return cost
        # What runs again is a forward within the backward; the rest are gradients, be they of
        # weights that cannot run apart.
        keep = self.part_cost(part, LayerStrategy.KEEP)
        again_ns = (cost.backward_ns + cost.weight_grad_ns) - (
            keep.backward_ns + keep.weight_grad_ns
        )
        graph, layers = self._graph(part), int(part.is_layer)
        whole = strategy is LayerStrategy.RECOMPUTE
        count = checkpoints(strategy, graph)
        gradients = graph.kernels(Phase.INPUT_GRAD) + graph.kernels(Phase.WEIGHT_GRAD)
        return replace(
            cost,
            forward_ns=profile.layer_forward(
                cost.forward_ns, layers=layers, kernels=graph.kernels(Phase.FORWARD)
            )
            + count * profile.checkpoint_forward_ns,
            backward_ns=profile.layer_backward(
                cost.backward_ns - again_ns, layers=layers, kernels=gradients
            )
            + profile.layer_forward(
                again_ns, layers=int(whole), kernels=kernels_again(strategy, graph)
            )
            + count * profile.checkpoint_backward_ns,
            weight_grad_ns=profile.layer_backward(cost.weight_grad_ns, layers=0),
        )


def _scale_out_queues(profile: DeviceProfile, options: RunOptions) -> frozenset[Queue]:
    """Queues whose messages leave the node, by Megatron's order of ranks (tensor ranks closest)."""
    parallel = options.parallel
    reach = {
        Queue.TENSOR_LINK: parallel.tensor,
        Queue.CONTEXT_LINK: parallel.tensor * parallel.context,
        Queue.EXPERT_LINK: parallel.tensor * parallel.expert,
        Queue.DATA_LINK: parallel.tensor * parallel.context * parallel.data,
        Queue.PIPELINE_LINK: parallel.world_size,
    }
    return frozenset(queue for queue, ranks in reach.items() if ranks > profile.scale_up_ranks)
