"""How a training job's model is cut: by the paper's rules, as the flags say, or searched.

Every rank cuts for itself, before there are process groups, and all come to the same cut: it
follows from the arguments, and no clock is read.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkLayout, layers_text
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.partition.balance import Fixed, Workbench, balance_layout
from megatron_pipeweaver.partition.chunks import cut_as_given
from megatron_pipeweaver.partition.offline import Partition, partition_model
from megatron_pipeweaver.planner.settings import CostSettings
from megatron_pipeweaver.plugin.arguments import PipeWeaverArguments
from megatron_pipeweaver.plugin.providers import ModelFamily
from megatron_pipeweaver.search.brief import brief_searches
from megatron_pipeweaver.semu.memory import (
    OptimizerOptions,
    activation_capacity_bytes,
    rank_state_bytes,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def cut_model(
    args: argparse.Namespace,
    ours: PipeWeaverArguments,
    family: ModelFamily,
    costs: CostSettings,
    optimizer: OptimizerOptions,
) -> Partition:
    """B_i, K_i and layers per stage of the job's model.

    Args:
        args: Megatron's.
        ours: the flags.
        family: what the model is.
        costs: what stages cost.
        optimizer: what it keeps per parameter.

    Raises:
        ConfigError: a flag names a module that is not there, or a cut that cannot be.
        InfeasibleError: weights and optimizer state alone fill the device.
    """
    spec = family.spec(args)
    partition = partition_model(
        spec,
        args.pipeline_model_parallel_size,
        costs.make(),
        family.typical(args),
        sub_microbatch=_known(ours.sub_microbatch, "sub-microbatch", spec.modules[:-1]),
        segments=_known(ours.segments, "segments", spec.modules),
    )
    given = _known(ours.layers, "layers", spec.modules)
    partition = replace(partition, layout=cut_as_given(partition.layout, spec, given))
    if not ours.balance:
        return partition
    return replace(partition, layout=_searched(args, ours, family, costs, optimizer, partition))


def memory_capacity(
    ours: PipeWeaverArguments,
    spec: ModelSpec,
    layout: ChunkLayout,
    costs: CostSettings,
    optimizer: OptimizerOptions,
) -> tuple[int, ...]:
    """Bytes for activations by pipeline rank: a share of the device without weights and states.

    Raises:
        InfeasibleError: weights and optimizer state alone fill the device.
    """
    usable = int(costs.device.spec.memory_bytes * ours.memory_fraction)
    states = rank_state_bytes(spec, layout, costs.options, optimizer)
    return activation_capacity_bytes(usable, states, 0)


def _searched(
    args: argparse.Namespace,
    ours: PipeWeaverArguments,
    family: ModelFamily,
    costs: CostSettings,
    optimizer: OptimizerOptions,
    partition: Partition,
) -> ChunkLayout:
    """The cut by the schedules of batches as `family` expects them."""
    spec = family.spec(args)
    bench = Workbench(
        model=spec,
        sub_microbatch=partition.sub_microbatch,
        costs=costs.make(),
        capacity_bytes=lambda layout: memory_capacity(ours, spec, layout, costs, optimizer),
        parallel=costs.options.parallel,
        element_bytes=costs.options.element_bytes,
    )
    # Backwards are split in rare plans only, at a cost that is measured in training.
    search = SearchConfig(deterministic=ours.deterministic, split_weight_grad=False)
    found = balance_layout(
        partition.layout,
        bench,
        family.expected(args),
        args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        brief_searches(search),
        Fixed(segments=frozenset(ours.segments), layers=frozenset(ours.layers)),
    )
    _log.info(
        "cut: --pipeweaver-layers %s (expected iterations are %.1f %% shorter than with the "
        "paper's cut)",
        layers_text(found.layout),
        100 * found.gain,
    )
    return found.layout


def _known(values: Mapping[str, _T], flag: str, modules: Sequence[ModuleSpec]) -> Mapping[str, _T]:
    """`values`, whose keys are all names of `modules`; `ConfigError` names one that is not."""
    names = [one.name for one in modules]
    for name in values:
        if name not in names:
            raise ConfigError(f"--pipeweaver-{flag} {name}: no such module; there are {names}")
    return values
