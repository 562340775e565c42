"""The choices made once, before training: B_i and K_i of every module (paper, section 3).

costs ─► B_i (smallest efficient sub-microbatch) ─► T_i (module time at B_i) ─► K_i ─► layout
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.partition.chunks import (
    choose_segments,
    choose_sub_microbatch,
    make_layout,
    segment_limits,
)
from megatron_pipeweaver.partition.workload import make_workload
from megatron_pipeweaver.semu.interface import CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """How a model is cut (`layout`, with K_i) and how its items are split (`sub_microbatch`, B_i).

    `module_times_ns` are the T_i behind K_i: forward and backward of one sub-microbatch.
    """

    layout: ChunkLayout
    sub_microbatch: Mapping[str, int]
    module_times_ns: Mapping[str, int]


def partition_model(
    model: ModelSpec,
    pipeline_size: int,
    costs: CostModel,
    typical: MicrobatchMetadata,
    *,
    sub_microbatch: Mapping[str, int] | None = None,
    segments: Mapping[str, int] | None = None,
) -> Partition:
    """Choose B_i and K_i for `model` from the emulated times of a typical microbatch.

    Args:
        model: the modules.
        pipeline_size: pipeline ranks, P.
        costs: SEMU's times.
        typical: a full microbatch; its item counts bound the sizes that are tried, and the
            largest item of each module stands for all.
        sub_microbatch: B_i that the user has fixed.
        segments: K_i that the user has fixed.

    Raises:
        ConfigError: a module has no typical item, or a fixed K_i cannot be cut.
    """
    sizes = dict(sub_microbatch or {})
    for module in model.modules[:-1]:
        if module.name not in sizes:
            times = _times_by_size(model, module, costs, typical)
            sizes[module.name] = choose_sub_microbatch(times)
    times_ns = {
        module.name: _module_time_ns(model, module, costs, typical, sizes)
        for module in model.modules
    }
    chosen = choose_segments(times_ns, segment_limits(model, pipeline_size))
    layout = make_layout(model, pipeline_size, {**chosen, **(segments or {})})
    return Partition(layout=layout, sub_microbatch=sizes, module_times_ns=times_ns)


def _times_by_size(
    model: ModelSpec, module: ModuleSpec, costs: CostModel, typical: MicrobatchMetadata
) -> dict[int, int]:
    """Time of one pass over `module`, for every number of items up to the typical microbatch's."""
    return {
        size: _module_time_ns(model, module, costs, typical, {module.name: size})
        for size in range(1, max(1, typical.count(module.name)) + 1)
    }


def _module_time_ns(
    model: ModelSpec,
    module: ModuleSpec,
    costs: CostModel,
    typical: MicrobatchMetadata,
    sizes: Mapping[str, int],
) -> int:
    """Forward and backward of one full sub-microbatch through all of `module`, on one rank."""
    alone = MicrobatchMetadata(
        sequence_length=typical.sequence_length,
        samples=typical.samples,
        items=_full_sub_microbatch(model, module, typical, sizes),
        document_lengths=typical.document_lengths,
    )
    workload = make_workload(
        BatchMetadata(microbatches=(alone,)),
        model,
        make_layout(model, 1, {}),
        {one.name: sizes.get(one.name, 1) for one in model.modules[:-1]},
        costs,
        (0,),
    )
    total = 0
    for key, one in workload.problem.passes():
        if key.module == module.name:
            fastest = one.stages[0][0]
            total += fastest.forward_ns + fastest.backward_ns + fastest.weight_grad_ns
    return max(1, total)


def _full_sub_microbatch(
    model: ModelSpec, module: ModuleSpec, typical: MicrobatchMetadata, sizes: Mapping[str, int]
) -> dict[str, tuple[Item, ...]]:
    if module is model.backbone:
        return {}
    items = typical.items.get(module.name, ())
    if not items:
        raise ConfigError(
            f"partition: the typical microbatch has no item of module {module.name!r}; "
            "describe one, or fix its sub-microbatch size and segments"
        )
    return {module.name: (max(items, key=lambda one: one.units),) * sizes[module.name]}
