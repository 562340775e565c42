"""A whole training step: pipeline, gradient exchange, optimizer; busy time, memory and MFU.

rank r | pipeline schedule | gradients: reduce-scatter | optimizer | weights: all-gather |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.problem import OpKind, PassKey
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.semu.exchange import gather_delay_ns, rank_exchanges, reduced_ns
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.memory import (
    OptimizerOptions,
    ParameterCount,
    RankState,
    chunk_parameters,
    rank_states,
    updated_parameters,
)
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stages import module_stages, stage_parts
from megatron_pipeweaver.semu.work import OperatorClass, Phase, Work

_TRAINING_FACTOR = 3
"""Model FLOPs of a training step per forward FLOP: the backward counts twice (no recomputation)."""
_SECOND_NS = 1_000_000_000
_OPTIMIZER_KERNELS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One training step of one pipeline replica; per-rank numbers are by pipeline rank.

    `exposed_ns` is communication within the rank's stages (tensor, context, expert parallelism)
    that compute waits for, a part of `busy_ns`. Of `gradient_exchange_ns`, gradients and weights
    between replicas, `exposed_exchange_ns` is not hidden behind the pipeline.
    `mfu` is model FLOPs over what all ranks of the replica could compute in `iteration_ns`.
    """

    iteration_ns: int
    pipeline_ns: int
    busy_ns: tuple[int, ...]
    bubble_ns: tuple[int, ...]
    exposed_ns: tuple[int, ...]
    gradient_exchange_ns: tuple[int, ...]
    exposed_exchange_ns: tuple[int, ...]
    optimizer_ns: tuple[int, ...]
    states: tuple[RankState, ...]
    peak_bytes: tuple[int, ...]
    model_flops: int
    mfu: float

    @property
    def state_bytes(self) -> tuple[int, ...]:
        """Weights, gradients and optimizer state together, by pipeline rank."""
        return tuple(one.total_bytes for one in self.states)


def emulate_step(
    *,
    schedule: Schedule,
    model: ModelSpec,
    layout: ChunkLayout,
    costs: AnalyticCostModel,
    model_flops: int,
    reserve_bytes: int = 0,
    optimizer: OptimizerOptions | None = None,
    loads: Mapping[PassKey, Load] | None = None,
) -> StepReport:
    """The step that runs `schedule` and then exchanges gradients and updates weights.

    Gradients are reduced behind the pipeline, as PipeWeaver's schedule function has it, unless the
    optimizer's options say that the exchange hides behind compute.

    Args:
        schedule: of one replica.
        model: the modules.
        layout: their cut.
        costs: device and run options.
        model_flops: see `forward_flops`; of one replica's share of the batch, training included.
        reserve_bytes: working memory on top of what stage pairs hold.
        optimizer: what it keeps.
        loads: what passes work on; those that are not named expose no communication.
    """
    rule = optimizer or OptimizerOptions()
    options = costs.options
    busy = tuple(sum(op.end_ns - op.start_ns for op in rank) for rank in schedule.ranks)
    if len(busy) != layout.pipeline_size:
        raise ConfigError(
            f"step: the schedule has {len(busy)} ranks, the layout {layout.pipeline_size}"
        )
    exchanges = tuple(zip(rank_exchanges(model, layout, costs, rule), schedule.ranks, strict=True))
    reduced = [
        reduced_ns(chunks, ops, overlap=rule.overlap_grad_reduce) for chunks, ops in exchanges
    ]
    delays = [
        gather_delay_ns(chunks, ops, overlap=rule.overlap_param_gather) for chunks, ops in exchanges
    ]
    ends = [max((op.end_ns for op in ops), default=0) for ops in schedule.ranks]
    update = tuple(
        _optimizer_ns(_trained(model, layout, rank, options), costs, rule)
        for rank in range(layout.pipeline_size)
    )
    states = rank_states(model, layout, options, rule)
    # All ranks wait for the norm of all gradients; then the slowest update and gather count.
    behind = max(one + other for one, other in zip(update, delays, strict=True))
    iteration = max(schedule.makespan_ns, *reduced) + behind
    return StepReport(
        iteration_ns=iteration,
        pipeline_ns=schedule.makespan_ns,
        busy_ns=busy,
        bubble_ns=tuple(schedule.makespan_ns - one for one in busy),
        exposed_ns=_exposed_ns(schedule, model, layout, costs, loads or {}),
        gradient_exchange_ns=tuple(
            sum(chunk.reduce_ns + chunk.gather_ns for chunk in chunks) for chunks, _ in exchanges
        ),
        exposed_exchange_ns=tuple(
            end - last + delay for end, last, delay in zip(reduced, ends, delays, strict=True)
        ),
        optimizer_ns=update,
        states=states,
        peak_bytes=tuple(
            state.total_bytes + held + reserve_bytes
            for state, held in zip(states, schedule.peak_memory_bytes, strict=True)
        ),
        model_flops=model_flops,
        mfu=utilisation(model_flops, iteration, options.parallel, costs.profile.spec.flops),
    )


def _exposed_ns(
    schedule: Schedule,
    model: ModelSpec,
    layout: ChunkLayout,
    costs: AnalyticCostModel,
    loads: Mapping[PassKey, Load],
) -> tuple[int, ...]:
    """By rank, how long ops wait for the other ranks that share their stage.

    A weight gradient that runs apart has no communication of its own: that of the whole backward
    counts with the input gradient.
    """
    stages = {one.module: module_stages(one) for one in layout.modules}

    def of(op: ScheduledOp) -> int:
        key = op.key
        if op.kind is OpKind.W or key.owner not in loads:
            return 0
        return costs.exposed_ns(
            model.module(key.module),
            stages[key.module][key.stage],
            loads[key.owner],
            op.strategy,
            backward=op.kind is OpKind.B,
        )

    return tuple(sum(map(of, rank)) for rank in schedule.ranks)


def utilisation(
    model_flops: int, iteration_ns: int, parallel: ParallelSizes, device_flops: int
) -> float:
    """Model FLOPs over what the ranks of one replica could compute in `iteration_ns`."""
    ranks = parallel.pipeline * parallel.tensor * parallel.context
    possible = ranks * device_flops * iteration_ns
    return model_flops * _SECOND_NS / possible if possible else 0.0


def forward_flops(module: ModuleSpec, load: Load, options: RunOptions) -> int:
    """Matrix FLOPs of one forward through the whole module, over all tensor-parallel ranks."""
    whole = RunOptions(attention=options.attention)
    stage = StageShape(layers=module.layers, is_first=True, is_last=True)
    return sum(
        part.copies * part.build(whole).flops(Phase.FORWARD)
        for part in stage_parts(module, stage, load)
    )


def training_flops(module: ModuleSpec, load: Load, options: RunOptions) -> int:
    """Model FLOPs of one pass: three forwards' worth, or one for a frozen module."""
    return forward_flops(module, load, options) * (1 if module.frozen else _TRAINING_FACTOR)


def _trained(
    model: ModelSpec, layout: ChunkLayout, rank: int, options: RunOptions
) -> ParameterCount:
    """Parameters of the rank's chunks that are not frozen."""
    counts = [
        count
        for place, count in zip(
            layout.chunks_of_rank(rank),
            chunk_parameters(model, layout, rank, options),
            strict=True,
        )
        if not model.module(place.module).frozen
    ]
    return ParameterCount(sum(one.shared for one in counts), sum(one.experts for one in counts))


def _optimizer_ns(count: ParameterCount, costs: AnalyticCostModel, rule: OptimizerOptions) -> int:
    """Norm of the gradients, clipping, update, weights cast, gradients zeroed, one after another.

    All but the zeros are of this rank's share of a distributed optimizer.
    """
    gradient = costs.options.gradient_bytes
    norm, clip, update = gradient, 2 * gradient, 2 * rule.state_bytes + gradient
    share = updated_parameters(count, costs.options, rule)
    moved = share * (norm + clip + update + costs.options.element_bytes)
    work = Work(memory_bytes=moved + count.total * gradient, kernels=_OPTIMIZER_KERNELS)
    return costs.work_ns(work, OperatorClass.OPTIMIZER)
