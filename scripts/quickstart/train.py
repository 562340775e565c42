"""Trains a small vision-language model on four CPU ranks through PipeWeaver's schedule.

Started by ``scripts/quickstart.sh`` through torchrun; every rank runs this file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see megatron_pipeweaver.plugin.cpu

import torch
import torch.distributed as dist
from digits import IMAGE, IMAGE_SIZE, MODULE, DigitsTask, answer_kinds, load_split
from logbook import Logbook
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from recipe import RECIPE, learning_rate, model_spec

from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.errors import PipeWeaverError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import initialize_by_name
from megatron_pipeweaver.partition.offline import Partition, partition_model
from megatron_pipeweaver.planner.background import BackgroundConfig, BackgroundSource
from megatron_pipeweaver.planner.settings import CostSettings, PlannerSettings
from megatron_pipeweaver.planner.source import InProcessSource, PlanSource
from megatron_pipeweaver.plugin.compat import default_pg_collection
from megatron_pipeweaver.plugin.install import install, run_on_cpu, uninstall
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.options import Attention, RunOptions

Batch = Mapping[str, Any]


def main() -> int:
    """Train, read the held-out digits, and show what the schedule was worth."""
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        run(args)
    except PipeWeaverError as error:
        print(f"quickstart: rank {os.environ.get('RANK', '?')}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        uninstall()
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--iterations", type=int, default=RECIPE.iterations)
    parser.add_argument("--search-seconds", type=float, default=RECIPE.search_seconds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--foreground-planner",
        action="store_true",
        help="search before each iteration, instead of in a process of its own during the last one",
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """One rank's whole life."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    run_on_cpu()
    costs = cost_settings(dist.get_world_size())
    partition = partition_model(
        model_spec(), dist.get_world_size(), costs.make(), typical_microbatch()
    )
    with contextlib.closing(make_source(args, costs, partition)) as source:
        run_planned(args, partition, source)


def run_planned(args: argparse.Namespace, partition: Partition, source: PlanSource) -> None:
    """All that needs plans."""
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=dist.get_world_size(),
        virtual_pipeline_model_parallel_size=partition.layout.virtual_size,
    )
    model_parallel_cuda_manual_seed(args.seed)
    model, optimizer = build_model(partition, args.seed)
    logbook = Logbook(args.output, args.iterations, MODULE)
    install(
        PipeWeaverSchedule(
            source,
            lambda batch: batch["metadata"],
            gather_traces=True,
            on_iteration=logbook.record,
        )
    )
    announce(partition)
    train_digits, held_out_digits = load_split()
    train(args, model, optimizer, logbook, DigitsTask(RECIPE.task, train_digits))
    logbook.draw()
    correct, count = read_held_out(model, DigitsTask(RECIPE.task, held_out_digits))
    if is_last_rank():
        print(f"\nheld-out digits read: {correct} of {count} = {correct / count * 100:.2f} %\n")
        print(logbook.table())
        print(
            "\nEmulated on the same chunks and batches; what four ranks measure on fewer cores than"
            "\nranks is no pipeline time.\n"
            f"plans, traces and timelines: {args.output}/"
        )
    dist.barrier()
    if plans_here():
        print(f"plans: {source.counters}")
        tell_of_errors(source)


def is_last_rank() -> bool:
    """Whether this rank makes the loss, and so does the talking."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def plans_here() -> bool:
    """Whether this rank makes the plans."""
    return dist.get_rank() == 0


def tell_of_errors(source: PlanSource) -> None:
    """Say what the planner has learnt from measured times."""
    if isinstance(source, BackgroundSource) and source.errors_permille:
        errors = [one / 10 for one in source.errors_permille]
        few = max(1, len(errors) // 4)
        print(
            "emulated against measured stage times, median error: "
            f"{errors[0]:.1f} % in the first iteration, {median(errors[-few:]):.1f} % in the last "
            f"{few}"
        )


def announce(partition: Partition) -> None:
    """Say how the model was cut."""
    if is_last_rank():
        for one in partition.layout.modules:
            size = partition.sub_microbatch.get(one.module)
            items = "" if size is None else f", at most {size} images a sub-microbatch"
            print(f"{one.module}: {one.segments} segment(s), layers per stage {one.layers}{items}")


# --- planning ------------------------------------------------------------------------------------


def cost_settings(pipeline_size: int) -> CostSettings:
    """SEMU for one CPU core a rank and Megatron's unfused layers in fp32."""
    return CostSettings(
        device=load_device("cpu"),
        options=RunOptions(
            parallel=ParallelSizes(pipeline=pipeline_size),
            attention=Attention.DENSE,
            element_bytes=4,
            gradient_bytes=4,
            fused_norm=False,
            fused_activation=False,
            fused_linear=False,
        ),
    )


def typical_microbatch() -> MicrobatchMetadata:
    """A full microbatch, for choosing B_i and K_i."""
    image = Item(units=RECIPE.task.tokens_per_image, tokens=RECIPE.task.tokens_per_image)
    return MicrobatchMetadata(
        sequence_length=RECIPE.typical_sequence_length,
        samples=RECIPE.task.samples,
        items={MODULE: (image,) * RECIPE.typical_images},
    )


def make_source(args: argparse.Namespace, costs: CostSettings, partition: Partition) -> PlanSource:
    """The plans of the one pipeline; its planner's process starts while the model is built."""
    settings = planner_settings(args, costs, partition)
    if args.foreground_planner:
        return InProcessSource(settings.make())
    source = BackgroundSource(settings, BackgroundConfig(details=True))
    if plans_here():
        source.start()
    return source


def planner_settings(
    args: argparse.Namespace, costs: CostSettings, partition: Partition
) -> PlannerSettings:
    """What plans are made from."""
    pipeline_size = partition.layout.pipeline_size
    return PlannerSettings(
        model=model_spec(),
        layout=partition.layout,
        costs=costs,
        sub_microbatch=partition.sub_microbatch,
        memory_capacity_bytes=(RECIPE.activation_bytes,) * pipeline_size,
        dtypes={one.name: "float32" for one in model_spec().modules},
        search=SearchConfig(
            time_budget_ns=round(args.search_seconds * SECOND_NS),
            threads=1,
            seed=args.seed,
            split_weight_grad=False,
        ),
    )


# --- model ---------------------------------------------------------------------------------------


def build_model(partition: Partition, seed: int) -> tuple[list[torch.nn.Module], MegatronOptimizer]:
    """This rank's chunks in Megatron's DDP, and Megatron's optimizer over them."""
    options = ModelOptions(
        image_size=IMAGE_SIZE,
        image_token_id=IMAGE,
        common={"init_method_std": RECIPE.init_std},
        initialize=partial(initialize_by_name, seed=seed),
    )
    chunks = build_chunks(
        model_spec(), partition.layout, options, pg_collection=default_pg_collection()
    )
    config = chunks[0].config
    settings = DistributedDataParallelConfig(overlap_grad_reduce=False)
    model = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=RECIPE.learning_rate,
            weight_decay=RECIPE.weight_decay,
            adam_beta2=RECIPE.adam_beta2,
            clip_grad=1.0,
            params_dtype=torch.float32,
        ),
        model,
    )
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return model, optimizer


def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
    """Megatron's forward step: one microbatch through one chunk."""
    batch = next(iterator)
    return model(batch), partial(answer_loss, batch)


def answer_loss(
    batch: Batch, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss of the answers, how many there are, and both for the record."""
    mask = batch["loss_mask"]
    total, count = (losses.float() * mask).sum(), mask.sum()
    record = torch.stack([total.detach(), count])
    return total, count.to(torch.int), {"lm loss": record}


# --- loops ---------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace,
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    logbook: Logbook,
    task: DigitsTask,
) -> None:
    """All training iterations, with a progress line each."""
    run_iteration = get_forward_backward_func()
    batches = microbatches(task, args.iterations)
    for iteration in range(args.iterations):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, args.iterations)
        outcomes = run_iteration(
            forward_step_func=forward_step,
            data_iterator=[batches] * len(model),
            model=model,
            num_microbatches=task.config.microbatches,
            seq_length=RECIPE.typical_sequence_length,
            micro_batch_size=task.config.samples,
        )
        optimizer.step()
        if is_last_rank():
            total, count = torch.stack([one["lm loss"] for one in outcomes]).sum(0).tolist()
            print(logbook.progress(total / max(count, 1)), flush=True)


def microbatches(task: DigitsTask, iterations: int) -> Iterator[Batch]:
    """The microbatches of all iterations, with their metadata beside the tensors."""
    for iteration, index in itertools.product(range(iterations), range(task.config.microbatches)):
        one = task.microbatch(iteration, index)
        yield {**one.tensors, "metadata": one.metadata}


def read_held_out(model: list[torch.nn.Module], task: DigitsTask) -> tuple[int, int]:
    """(correct, all) readings of the held-out digits; known on the last rank, else (0, 0).

    A reading is the most probable token behind the image's colon. The true earlier answers stand
    in the sequence, but a digit does not depend on them.
    """
    tests = list(task.reading_test())
    batches = ({**one.tensors, "labels": None, "metadata": one.metadata} for one in tests)
    with torch.no_grad():
        outcomes = get_forward_backward_func()(
            forward_step_func=forward_step_of_reading,
            data_iterator=[batches] * len(model),
            model=model,
            num_microbatches=len(tests),
            seq_length=RECIPE.typical_sequence_length,
            micro_batch_size=task.config.samples,
            forward_only=True,
            collect_non_loss_data=True,
        )
    correct = count = 0
    for one, logits in zip(tests, outcomes, strict=False):
        asked = answer_kinds(one.tensors)
        read = logits.argmax(-1)[asked]
        correct += int((read == one.tensors["labels"][asked]).sum())
        count += int(asked.sum())
    return correct, count


def forward_step_of_reading(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
    """A forward step whose last chunk hands out logits ``[b, s, vocabulary]``."""
    return model(next(iterator)), lambda logits, non_loss_data: logits


if __name__ == "__main__":
    sys.exit(main())
