"""Trains the small model of the unit tests on gloo ranks, and in one process as the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import global_parameters
from megatron_pipeweaver.partition.sub_microbatch import split
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.plugin.compat import default_pg_collection
from megatron_pipeweaver.plugin.data import DescribeMicrobatch
from megatron_pipeweaver.plugin.install import install, run_on_cpu, uninstall
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from megatron_pipeweaver.semu.interface import Load, StageShape
from tests.unit.models.examples import OPTIONS, batch, describe, one_pass

Microbatch = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, its cut, how it is trained, and on what: metadata and random batches."""

    spec: ModelSpec
    layout: ChunkLayout
    images_per_pass: int = 2
    options: ModelOptions = OPTIONS
    deterministic: bool = True
    split: bool = False
    overlap_grad_reduce: bool = False
    per_token_loss: bool = False
    describe: DescribeMicrobatch = field(default_factory=lambda: describe)
    draw: Callable[[random.Random, torch.dtype], list[dict[str, Any]]] = field(
        default_factory=lambda: random_batch
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomCosts:
    """Times that no device would have, so that schedules differ wildly; a `CostModel`."""

    seed: int

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        key = (self.seed, module.name, stage, load.sequence, load.batch)
        rng = random.Random(repr(key))
        forward_ns, memory = rng.randint(1, 1000), rng.randint(100, 1000)
        keep = Strategy(
            name="keep",
            forward_ns=forward_ns,
            backward_ns=rng.randint(1, 2000),
            weight_grad_ns=rng.randint(0, 500),
            memory_bytes=memory,
        )
        if not stage.layers:
            return (keep,)
        lean = dataclasses.replace(
            keep,
            name="recompute",
            backward_ns=keep.backward_ns + forward_ns,
            memory_bytes=memory // 10,
        )
        return keep, lean

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return self.seed % 50


@contextlib.contextmanager
def megatron_ranks(
    pipeline_size: int, virtual_size: int | None, context_size: int = 1, expert_size: int = 1
) -> Iterator[Any]:
    """Megatron's parallel state on this job's ranks; yields the process groups."""
    with run_on_cpu():
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=pipeline_size,
            virtual_pipeline_model_parallel_size=virtual_size,
            context_parallel_size=context_size,
            expert_model_parallel_size=expert_size,
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            yield default_pg_collection()
        finally:
            parallel_state.destroy_model_parallel()


def random_batch(rng: random.Random, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Microbatches with 0 to 5 images each, some of them text alone."""
    made = []
    for _ in range(rng.randint(1, 6)):
        images = rng.choice([0, 0, 1, 2, 3, 5])
        one = batch(images, samples=rng.randint(1, 2), seed=rng.randrange(10**6))
        made.append({**one, "images": one["images"].to(dtype)})
    return made


def schedule_for(case: Case, seed: int, **settings: Any) -> PipeWeaverSchedule:
    """PipeWeaver's schedule function for `case`, planning by random costs."""
    dtype = str(case.options.params_dtype).removeprefix("torch.")
    context = case.options.common.get("context_parallel_size", 1)
    planner = Planner(
        model=case.spec,
        layout=case.layout,
        costs=settings.pop("costs", RandomCosts(seed=seed)),
        sub_microbatch={one.name: case.images_per_pass for one in case.spec.modules[:-1]},
        memory_capacity_bytes=(30_000,) * case.layout.pipeline_size,
        dtypes={one.name: dtype for one in case.spec.modules},
        parallel=ParallelSizes(pipeline=case.layout.pipeline_size, context=context),
        search=SearchConfig(
            time_budget_ns=20_000_000,
            max_rounds=20,
            seed=seed,
            deterministic=case.deterministic,
            split_weight_grad=case.split,
        ),
    )
    settings.setdefault("wait_timeout", timedelta(seconds=20))
    return PipeWeaverSchedule(planner, case.describe, **settings)


def masked_mean(microbatch: Microbatch, losses_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A microbatch's loss, as Megatron's two-tuple."""
    mask = microbatch["loss_mask"].to(losses_BS.dtype)
    loss = (losses_BS * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"lm loss": loss.detach().clone()}


def masked_sum(
    microbatch: Microbatch, losses_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A microbatch's loss, as Megatron's three-tuple for a loss per token."""
    mask = microbatch["loss_mask"].to(losses_BS.dtype)
    loss = (losses_BS * mask).sum()
    return loss, mask.sum().to(torch.int), {"lm loss": loss.detach().clone()}


def forward_step(
    loss_function: Callable[..., Any], iterator: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[Any, Any]:
    """Megatron's forward step."""
    microbatch = next(iterator)
    return model(microbatch), partial(loss_function, microbatch)


@dataclass(slots=True)
class Trainer:
    """This rank's chunks of `case` in Megatron's DDP; runs iterations by the installed schedule."""

    case: Case
    groups: Any
    model: list[DistributedDataParallel] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        chunks = build_chunks(case.spec, case.layout, case.options, pg_collection=self.groups)
        config = chunks[0].config
        config.calculate_per_token_loss = case.per_token_loss
        settings = DistributedDataParallelConfig(
            overlap_grad_reduce=case.overlap_grad_reduce, bucket_size=500
        )
        self.model = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        config.finalize_model_grads_func = finalize_model_grads
        if case.overlap_grad_reduce:
            config.no_sync_func = [one.no_sync for one in self.model]

    def step(self, microbatches: Sequence[Microbatch], **arguments: Any) -> list[Any]:
        """One iteration from zero gradients; returns what the schedule function returned."""
        for one in self.model:
            one.zero_grad_buffer()
        loss_function = masked_sum if self.case.per_token_loss else masked_mean
        first = self.case.describe(microbatches[0])
        outcomes: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(forward_step, loss_function),
            data_iterator=[iter(microbatches) for _ in self.model],
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=first.sequence_length,
            micro_batch_size=first.samples,
            **arguments,
        )
        return outcomes

    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's gradient by global name (tied copies under names of their own)."""
        chunks = [one.module for one in self.model]
        return {
            name: one.main_grad.clone()  # type: ignore[attr-defined]
            for name, one in global_parameters(chunks)
            if one.requires_grad
        }


class OneProcess:
    """The same chunks of all ranks in this process, run one microbatch after another."""

    def __init__(self, case: Case, groups: Any) -> None:
        self.case = case
        self.stages: dict[str, list[ModelChunk]] = {
            one.module: [None] * len(one.layers)  # type: ignore[list-item]
            for one in case.layout.modules
        }
        for rank in range(case.layout.pipeline_size):
            for chunk in build_chunks(
                case.spec, case.layout, case.options, pg_collection=groups, rank=rank
            ):
                self.stages[chunk.place.module][chunk.place.stage] = chunk

    def step(
        self, microbatches: Sequence[Microbatch], divisor: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """(loss of every microbatch, every gradient of their sum over `divisor`)."""
        for chunk in self._chunks():
            chunk.zero_grad()
        losses = [self._microbatch(one, divisor) for one in microbatches]
        grads = {
            name: torch.zeros_like(one) if one.grad is None else one.grad
            for name, one in global_parameters(self._chunks())
            if one.requires_grad
        }
        return losses, grads

    def _chunks(self) -> list[ModelChunk]:
        return [chunk for stages in self.stages.values() for chunk in stages]

    def _microbatch(self, microbatch: Microbatch, divisor: int) -> Tensor:
        found = self.case.describe(microbatch)
        backbone = self.case.spec.backbone
        parts = [
            (module, items)
            for module in self.case.spec.modules[:-1]
            for items in split(found.count(module.name), self.case.images_per_pass)
        ]
        passes = [self._forward(module.name, microbatch, (), items) for module, items in parts]
        inputs = tuple(
            steps[-1][1].detach().requires_grad_(not module.frozen)
            for (module, _), steps in zip(parts, passes, strict=True)
        )
        sources = [module.name for module, _ in parts]
        steps = self._forward(backbone.name, microbatch, inputs, (0, 1), sources)
        loss_function = masked_sum if self.case.per_token_loss else masked_mean
        loss = loss_function(microbatch, steps[-1][1])[0]
        self._backward([*steps[:-1], (steps[-1][0], loss / divisor)], None)
        for one, given in zip(passes, inputs, strict=True):
            if given.grad is not None:
                self._backward(one, given.grad)
        return loss.detach()

    def _forward(
        self,
        module: str,
        microbatch: Microbatch,
        inputs: tuple[Tensor, ...],
        items: tuple[int, int],
        sources: Sequence[str] = (),
    ) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        steps = []
        for chunk in self.stages[module]:
            chunk.set_pass(one_pass(module, *items, after=sources))
            chunk.set_input_tensor(list(inputs))
            output = chunk(microbatch)
            steps.append((inputs, output))
            inputs = (output.detach().requires_grad_(output.requires_grad),)
        return steps

    @staticmethod
    def _backward(steps: Sequence[tuple[tuple[Tensor, ...], Tensor]], grad: Tensor | None) -> None:
        for inputs, output in reversed(steps):
            torch.autograd.backward(output, grad)
            grad = inputs[0].grad if len(inputs) == 1 else None


def reduced(case: Case, replicas: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What Megatron makes of the replicas' gradients: their mean, tied copies summed."""
    share = 1.0 if case.per_token_loss else 1.0 / len(replicas)
    total = {
        name: sum((one[name] * share for one in replicas[1:]), replicas[0][name] * share)
        for name in replicas[0]
    }
    if case.spec.backbone.tied_embeddings:
        names = [
            "language_model.embedding.word_embeddings.weight",
            "language_model.output_layer.weight",
        ]
        both = total[names[0]] + total[names[1]]
        total |= dict.fromkeys(names, both)
    return total


def replica_rank() -> int:
    """Which data-parallel replica this rank is of."""
    return int(parallel_state.get_data_parallel_rank())


@contextlib.contextmanager
def installed(schedule: PipeWeaverSchedule) -> Iterator[None]:
    """`schedule` in Megatron's place for a while."""
    install(schedule)
    try:
        yield
    finally:
        uninstall()
        dist.barrier()
