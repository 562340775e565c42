"""The paper's five setups with dynamic batches, planned both ways (paper, section 7)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.paced.megatron import Joint, MegatronSetting
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.plan import PassPayload, Plan, VerifiedPlan
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.partition.offline import Partition, partition_model
from megatron_pipeweaver.partition.tune import Job, working_bytes
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.planner.settings import CostSettings, PlannerSettings
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.memory import activation_capacity_bytes, rank_state_bytes
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import setup_preset

SETUPS = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l")
DEVICE = "H800"
MOST_IMAGES = 48
MOST_CLIPS = 8
MOST_SECONDS = 16
PATCHES_PER_SECOND = 512
CHUNKS_PER_RANK = (2, 3, 4, 5, 6)
TINY = (1, 1, 2)
"""Shape of every tensor that crosses ranks: a time stamp and a zero, as float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """PipeWeaver's plan for one batch, its tensors tiny; times come from `problem`."""

    plan: VerifiedPlan
    problem: Problem
    emulated_ns: int
    lower_bound_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedCase:
    """One setup: the same batches planned by PipeWeaver, and Megatron's settings."""

    setup: str
    pipeline_size: int
    batches: tuple[BatchMetadata, ...]
    planned: tuple[PlannedBatch, ...]
    megatron: tuple[MegatronSetting, ...]


def draw_batches(setup: str, count: int, microbatches: int, seed: int) -> tuple[BatchMetadata, ...]:
    """Dynamic batches: every microbatch has its own number of images, or of clips."""
    source = random.Random(f"{setup}:{seed}")
    return tuple(
        BatchMetadata(microbatches=tuple(_microbatch(setup, source) for _ in range(microbatches)))
        for _ in range(count)
    )


def _microbatch(setup: str, source: random.Random) -> MicrobatchMetadata:
    return _images(source) if setup.startswith("vlm") else _clips(source)


def _images(source: random.Random) -> MicrobatchMetadata:
    """8192 tokens with up to 48 images of 728 px: 2704 patches, 169 tokens each."""
    count = source.randint(0, MOST_IMAGES)
    return MicrobatchMetadata(
        sequence_length=8192, items={"vision": (Item(units=2704, tokens=169),) * count}
    )


def _clips(source: random.Random) -> MicrobatchMetadata:
    """Clips of 2 to 16 s, a prompt of 256 tokens each, packed while they fit into 16 s."""
    seconds: list[int] = []
    while len(seconds) < MOST_CLIPS:
        one = source.randint(2, MOST_SECONDS)
        if sum(seconds) + one > MOST_SECONDS:
            break
        seconds.append(one)
    lengths = tuple(PATCHES_PER_SECOND * one for one in seconds)
    return MicrobatchMetadata(
        sequence_length=sum(lengths),
        items={"text": (Item(units=256, tokens=256),) * len(lengths)},
        document_lengths=lengths,
    )


def make_job(setup: str, batches: Sequence[BatchMetadata]) -> Job:
    """`setup` on the H800, for `batches`."""
    preset = setup_preset(setup)
    return Job(
        model=preset.model,
        device=load_device(DEVICE),
        microbatches=tuple(one for batch in batches for one in batch.microbatches),
        options=RunOptions(parallel=preset.parallel),
    )


def make_case(
    setup: str, *, batches: int, microbatches: int, seed: int, search: SearchConfig
) -> PacedCase:
    """Plan `batches` dynamic batches of `setup` by PipeWeaver and for Megatron."""
    drawn = draw_batches(setup, batches, microbatches, seed)
    job = make_job(setup, drawn)
    pipeline_size = job.options.parallel.pipeline
    joint = Joint(
        model=job.model,
        pipeline_size=pipeline_size,
        costs=AnalyticCostModel(job.device, job.options),
        optimizer=job.optimizer,
        device_bytes=job.device.spec.memory_bytes,
        batches=drawn,
    )
    return PacedCase(
        setup=setup,
        pipeline_size=pipeline_size,
        batches=drawn,
        planned=_planned(make_planner(job, drawn, search), drawn),
        megatron=(
            joint.best("megatron", joint.parameter_weights(), CHUNKS_PER_RANK),
            joint.best("megatron-time", joint.time_weights(), CHUNKS_PER_RANK),
        ),
    )


def make_planner(job: Job, batches: Sequence[BatchMetadata], search: SearchConfig) -> Planner:
    """PipeWeaver's planner for `job`, cut for the batch's largest microbatch."""
    settings = make_settings(job, batches, search)
    return Planner(
        model=settings.model,
        layout=settings.layout,
        costs=settings.costs.make(),
        sub_microbatch=settings.sub_microbatch,
        memory_capacity_bytes=settings.memory_capacity_bytes,
        dtypes=settings.dtypes,
        search=search,
        parallel=job.options.parallel,
    )


def make_settings(
    job: Job, batches: Sequence[BatchMetadata], search: SearchConfig
) -> PlannerSettings:
    """What PipeWeaver's planner for `job` is made from, cut for the batch's largest microbatch."""
    costs = AnalyticCostModel(job.device, job.options)
    typical = max(job.microbatches, key=lambda one: sum(map(len, one.items.values())))
    cut = partition_model(job.model, job.options.parallel.pipeline, costs, typical)
    return PlannerSettings(
        model=job.model,
        layout=cut.layout,
        costs=CostSettings(
            device=job.device,
            options=job.options,
            strategies=job.strategies,
            candidates=job.candidates,
        ),
        sub_microbatch=cut.sub_microbatch,
        memory_capacity_bytes=_capacity_bytes(job, costs, batches, cut),
        dtypes={one.name: "bfloat16" for one in job.model.modules},
        search=search,
    )


def _planned(planner: Planner, batches: Sequence[BatchMetadata]) -> tuple[PlannedBatch, ...]:
    """Through the planner: partition, search, compile, verify."""
    made = []
    for batch in batches:
        planned = planner.plan(batch)
        made.append(
            PlannedBatch(
                plan=verify(with_tiny_tensors(planned.plan.plan)),
                problem=planned.problem,
                emulated_ns=planned.schedule.makespan_ns,
                lower_bound_ns=planned.schedule.lower_bound_ns,
            )
        )
    return tuple(made)


def _capacity_bytes(
    job: Job, costs: AnalyticCostModel, batches: Sequence[BatchMetadata], cut: Partition
) -> tuple[int, ...]:
    return activation_capacity_bytes(
        job.device.spec.memory_bytes,
        rank_state_bytes(job.model, cut.layout, job.options, job.optimizer),
        max(working_bytes(job, batch, cut, costs) for batch in batches),
    )


def with_tiny_tensors(plan: Plan) -> Plan:
    """The same plan for tensors of two numbers each, to be verified anew."""

    def tiny(payload: PassPayload) -> PassPayload:
        return replace(payload, hidden_shape=TINY, output_shape=TINY)

    return replace(
        plan,
        passes=tuple(replace(one, payload=tiny(one.payload)) for one in plan.passes),
        messages=tuple(replace(one, shape=TINY, dtype="float64") for one in plan.messages),
    )


def describe(case: PacedCase) -> Mapping[str, str]:
    """What was chosen, for the report."""
    modules = dict(case.planned[0].problem.modules)
    chosen = {"pipeweaver": f"segments {modules}"}
    for one in case.megatron:
        chosen[one.name] = (
            f"{one.chunks} chunks a rank, {one.recomputed} of their layers recomputed, "
            f"layers {list(one.layers)}"
        )
    return chosen
