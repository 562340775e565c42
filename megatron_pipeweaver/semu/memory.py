"""Memory that training needs besides activations: weights, gradients, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stages import stage_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """What the optimizer keeps per trained parameter (Adam: master weight and two moments).

    A `distributed` one spreads that over the replicas. With `overlap_grad_reduce` and
    `overlap_param_gather` the exchange between replicas hides behind the pipeline where it can, as
    Megatron's flags of these names have it (see `semu.exchange`).
    """

    state_bytes: int = 12
    distributed: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not self.distributed:
            raise ConfigError(
                "optimizer: overlap_param_gather needs a distributed optimizer; others gather "
                "nothing"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """Bytes that one rank holds from step to step."""

    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


class ParameterCount(NamedTuple):
    """Parameters of one rank: those of all replicas, and those of its own experts."""

    shared: int
    experts: int

    @property
    def total(self) -> int:
        """Both."""
        return self.shared + self.experts


class Replicas(NamedTuple):
    """How many ranks hold the same parameters, experts apart."""

    shared: int
    experts: int


def replicas(options: RunOptions) -> Replicas:
    """Ranks over which gradients are summed: data and context parallel ones, fewer for experts."""
    ranks = options.parallel.data * options.parallel.context
    return Replicas(ranks, max(1, ranks // options.parallel.expert))


def count_parameters(module: ModuleSpec, stage: StageShape, options: RunOptions) -> ParameterCount:
    """Parameters of one stage on one tensor-parallel rank."""
    units = module.patches_per_token
    one_token = Load(
        sequence=units, batch=1, lengths=(units,), output_tokens=1, context_lengths=(1,)
    )
    total = experts = 0
    for part in stage_parts(module, stage, one_token):
        graph = part.build(options)
        total += part.copies * graph.parameters
        experts += part.copies * graph.expert_parameters
    return ParameterCount(total - experts, experts)


def stage_parameters(module: ModuleSpec, stage: StageShape, options: RunOptions) -> int:
    """Parameters of one stage on one tensor-parallel rank, experts included."""
    return count_parameters(module, stage, options).total


def module_parameters(module: ModuleSpec, options: RunOptions | None = None) -> int:
    """Parameters of a whole module, projector and head included; on one rank by default."""
    whole = StageShape(layers=module.layers, is_first=True, is_last=True)
    return stage_parameters(module, whole, options or RunOptions())


def rank_parameters(model: ModelSpec, layout: ChunkLayout, options: RunOptions) -> list[int]:
    """Parameters that each pipeline rank holds, over all its chunks."""
    return [
        sum(count.total for count in chunk_parameters(model, layout, rank, options))
        for rank in _ranks(layout)
    ]


def rank_states(
    model: ModelSpec,
    layout: ChunkLayout,
    options: RunOptions,
    optimizer: OptimizerOptions | None = None,
) -> tuple[RankState, ...]:
    """Weights, gradients and optimizer state by pipeline rank.

    Frozen modules have weights alone. A distributed optimizer spreads its state over the
    data-parallel and context-parallel ranks, that of experts over those that hold the same ones.
    """
    rule = optimizer or OptimizerOptions()
    states = []
    for rank in _ranks(layout):
        weights = gradients = kept = 0
        for place, count in zip(
            layout.chunks_of_rank(rank),
            chunk_parameters(model, layout, rank, options),
            strict=True,
        ):
            weights += count.total * options.element_bytes
            if not model.module(place.module).frozen:
                gradients += count.total * options.gradient_bytes
                kept += updated_parameters(count, options, rule, rule.state_bytes)
        states.append(
            RankState(weight_bytes=weights, gradient_bytes=gradients, optimizer_bytes=kept)
        )
    return tuple(states)


def updated_parameters(
    count: ParameterCount, options: RunOptions, rule: OptimizerOptions, each: int = 1
) -> int:
    """How many parameters of a chunk one rank updates, times `each`."""
    ranks = replicas(options) if rule.distributed else Replicas(1, 1)
    return sum(-(-size * each // among) for size, among in zip(count, ranks, strict=True))


def rank_state_bytes(
    model: ModelSpec,
    layout: ChunkLayout,
    options: RunOptions,
    optimizer: OptimizerOptions | None = None,
) -> tuple[int, ...]:
    """Bytes of weights, gradients and optimizer state together, by pipeline rank."""
    return tuple(one.total_bytes for one in rank_states(model, layout, options, optimizer))


def activation_capacity_bytes(
    device_bytes: int, state_bytes: tuple[int, ...], reserve_bytes: int
) -> tuple[int, ...]:
    """What is left for activations on each rank, `reserve_bytes` of working memory set aside.

    Raises:
        InfeasibleError: the states alone do not fit on some rank.
    """
    left = tuple(device_bytes - state - reserve_bytes for state in state_bytes)
    for rank, capacity in enumerate(left):
        if capacity <= 0:
            raise InfeasibleError(
                f"rank {rank}: weights, gradients and optimizer state take {state_bytes[rank]} of "
                f"{device_bytes} bytes, {reserve_bytes} are reserved; use more ranks"
            )
    return left


def _ranks(layout: ChunkLayout) -> range:
    return range(layout.pipeline_size)


def chunk_parameters(
    model: ModelSpec, layout: ChunkLayout, rank: int, options: RunOptions
) -> list[ParameterCount]:
    """Parameters of every chunk of one pipeline rank, by virtual stage."""
    return [
        count_parameters(
            model.module(place.module),
            StageShape(
                layers=place.layers,
                is_first=place.is_first,
                is_last=place.is_last,
                first_layer=place.first_layer,
            ),
            options,
        )
        for place in layout.chunks_of_rank(rank)
    ]
