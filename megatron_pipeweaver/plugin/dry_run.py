"""Planning without training: the first batches' metadata, their plans, memory and time.

One process plays rank 0 of the whole job; its process groups are torch's fake ones, which talk to
nobody. Models are not built and nothing is computed, so it needs neither GPU nor memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.layout import layers_text
from megatron_pipeweaver.planner.planner import PlannedIteration
from megatron_pipeweaver.planner.settings import PlannerSettings
from megatron_pipeweaver.plugin.data import DescribeMicrobatch, describe_batch, pull_microbatches
from megatron_pipeweaver.view.report import format_table
from megatron_pipeweaver.view.units import milliseconds, percent, size

_HEADER = [
    "batch",
    "microbatches",
    "items",
    "planned",
    "bubble",
    "bound",
    "best static",
    "search",
    "activations of each rank",
]


def play_first_rank(args: argparse.Namespace) -> None:
    """Have Megatron set this process up as rank 0 of the job, alone.

    ``WORLD_SIZE`` says how many ranks the job has; at least one replica's, or those of all replicas
    that exchange tokens for experts.
    """
    args.fake_process_group = True
    replica = args.tensor_model_parallel_size * args.context_parallel_size
    experts = args.expert_model_parallel_size * (
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    )
    args.world_size = max(
        args.world_size, args.pipeline_model_parallel_size * math.lcm(replica, experts)
    )


def plan_batches(
    count: int,
    args: argparse.Namespace,
    settings: PlannerSettings,
    describe: DescribeMicrobatch,
    data_provider: Callable[..., Any],
) -> str:
    """Plan the first `count` batches of the first replica, and tell what came out.

    Megatron is initialised already.

    Args:
        count: how many batches.
        args: Megatron's arguments.
        settings: the planner's.
        describe: reads a microbatch's metadata.
        data_provider: the script's.

    Returns:
        The cut, and a table with a row per batch: planned time, its idle share, the proven lower
        bound, the best static schedule's time, and the peak of activations by pipeline rank.
    """
    batches = first_batches(count, args, describe, data_provider)
    planner = settings.make()
    rows = [
        _row(number, batch, planner.plan(batch)) for number, batch in enumerate(batches, start=1)
    ]
    capacity = ", ".join(size(one) for one in settings.memory_capacity_bytes)
    lines = [
        *(
            f"{one.module}: {one.segments} segment(s), layers per stage {one.layers}"
            for one in settings.layout.modules
        ),
        f"the same cut: --pipeweaver-layers {layers_text(settings.layout)}",
        f"sub-microbatch: {dict(settings.sub_microbatch)}",
        f"room for activations, by pipeline rank: {capacity}",
        "",
        format_table(_HEADER, rows),
    ]
    return "\n".join(lines)


def first_batches(
    count: int,
    args: argparse.Namespace,
    describe: DescribeMicrobatch,
    data_provider: Callable[..., Any],
) -> list[BatchMetadata]:
    """The metadata of the first `count` batches of the first replica."""
    from megatron.core.num_microbatches_calculator import (
        get_num_microbatches,
        update_num_microbatches,
    )
    from megatron.training import training

    args.iteration = 0
    training.update_train_iters(args)
    iterator = training.build_train_valid_test_data_iterators(data_provider)[0]
    batches = []
    for _ in range(count):
        update_num_microbatches(args.consumed_train_samples, consistency_check=False)
        microbatches = get_num_microbatches()
        batch = describe_batch(pull_microbatches(iterator, microbatches), describe)
        assert batch is not None  # rank 0 loads data
        batches.append(batch)
        args.consumed_train_samples += (
            microbatches * args.micro_batch_size * args.data_parallel_size
        )
    return batches


def _row(number: int, batch: BatchMetadata, planned: PlannedIteration) -> list[str]:
    schedule = planned.schedule
    items = sum(len(one) for micro in batch.microbatches for one in micro.items.values())
    return [
        str(number),
        str(len(batch.microbatches)),
        str(items),
        milliseconds(schedule.makespan_ns),
        percent(schedule.bubble()),
        milliseconds(schedule.lower_bound_ns),
        milliseconds(min(planned.baselines.values(), default=schedule.makespan_ns)),
        milliseconds(planned.search_ns),
        ", ".join(size(one) for one in schedule.peak_memory_bytes),
    ]
