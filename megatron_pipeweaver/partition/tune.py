"""Which DP x TP x PP, sub-microbatch sizes and segments train a model fastest on given ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.batch import BatchMetadata, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.problem import PassKey, Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.partition.balance import (
    Balance,
    Fixed,
    Probes,
    Workbench,
    balance_layout,
)
from megatron_pipeweaver.partition.candidates import DEFAULT_CANDIDATES, PerLayerCosts
from megatron_pipeweaver.partition.offline import Partition, partition_model
from megatron_pipeweaver.partition.workload import loads, make_workload
from megatron_pipeweaver.semu.devices import DeviceProfile
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.memory import (
    OptimizerOptions,
    activation_capacity_bytes,
    rank_state_bytes,
)
from megatron_pipeweaver.semu.model import DEFAULT_STRATEGIES, AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.reuse import DiskCache, Reuse
from megatron_pipeweaver.semu.stages import module_stages
from megatron_pipeweaver.semu.step import StepReport, emulate_step, training_flops

Scheduler = Callable[[Problem], Schedule]
"""Makes a schedule; raises `InfeasibleError` where there is none."""

_log = logging.getLogger(__name__)
_BALANCED = 3
"""So many of the fastest choices of parallel sizes have their cut searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained on what: the part of a run that tuning does not change.

    `microbatches` are a typical global batch, dealt to the data-parallel replicas in turn.
    `strategies` are what every layer may do, `candidates` how many mixtures of them a stage pair
    chooses from (S); `sub_microbatch` and `segments` fix B_i and K_i of the modules that they name.
    """

    model: ModelSpec
    device: DeviceProfile
    microbatches: tuple[MicrobatchMetadata, ...]
    options: RunOptions
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    strategies: tuple[LayerStrategy, ...] = DEFAULT_STRATEGIES
    candidates: int = DEFAULT_CANDIDATES
    sub_microbatch: Mapping[str, int] = field(default_factory=dict)
    segments: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run a job, and what its step costs: that of its slowest replica.

    `balance` is what the search for the cut found, where it was asked for.
    """

    parallel: ParallelSizes
    partition: Partition
    report: StepReport
    balance: Balance | None = None


def parallel_choices(
    ranks: int,
    microbatches: int,
    profile: DeviceProfile,
    model: ModelSpec,
    *,
    contexts: Sequence[int] = (1,),
    experts: Sequence[int] | None = None,
) -> Iterator[ParallelSizes]:
    """Every DP x TP x PP that fills `ranks`, with context- and expert-parallel sizes.

    Tensor-parallel ranks share the fast link and divide every module's heads and widths; every
    replica has a microbatch. Expert-parallel ranks are replicas that divide the experts of every
    module that has some.

    Args:
        ranks: devices in all.
        microbatches: of the global batch.
        profile: says how many ranks share the fast link.
        model: what is trained.
        contexts: context-parallel sizes to try.
        experts: expert-parallel sizes to try; all that fit by default.
    """
    for tensor in _divisors(ranks):
        if tensor > profile.scale_up_ranks or not _divides_widths(tensor, model):
            continue
        for context in contexts:
            if ranks // tensor % context:
                continue
            for pipeline in _divisors(ranks // tensor // context):
                data = ranks // tensor // context // pipeline
                if microbatches % data:
                    continue
                for expert in _expert_sizes(model, data * context, experts):
                    yield ParallelSizes(
                        pipeline=pipeline,
                        tensor=tensor,
                        data=data,
                        context=context,
                        expert=expert,
                        sequence_parallel=tensor > 1,
                    )


def _divides_widths(tensor: int, model: ModelSpec) -> bool:
    return not any(width % tensor for width in _widths(model).values())


def _widths(model: ModelSpec) -> dict[str, int]:
    """What tensor parallelism divides, by what to call it."""
    widths = {}
    for one in model.modules:
        widths[f"{one.name!r} has {one.attention_heads} attention heads"] = one.attention_heads
        widths[f"{one.name!r} has an FFN of {one.ffn_hidden_size}"] = one.ffn_hidden_size
        if one.layer.experts is not None:
            inner = one.layer.experts.ffn_hidden_size
            widths[f"{one.name!r} has experts of {inner}"] = inner
    return widths


def _check_sizes(job: Job, parallel: ParallelSizes) -> None:
    if len(job.microbatches) % parallel.data:
        raise ConfigError(
            f"{len(job.microbatches)} microbatches cannot be dealt to {parallel.data} replicas; "
            "give a multiple, or another data-parallel size"
        )
    for what, width in _widths(job.model).items():
        if width % parallel.tensor:
            raise ConfigError(
                f"tensor parallelism over {parallel.tensor} ranks: module {what}; give a divisor"
            )
    deepest = max(one.layers for one in job.model.modules)
    if parallel.pipeline > deepest:
        raise ConfigError(
            f"pipeline of {parallel.pipeline} ranks: no module has more than {deepest} layers; "
            "give fewer ranks"
        )


def _expert_sizes(model: ModelSpec, replicas: int, wanted: Sequence[int] | None) -> Iterator[int]:
    counts = [one.layer.experts.count for one in model.modules if one.layer.experts]
    for size in _divisors(replicas):
        divides = bool(counts) and not any(count % size for count in counts)
        if (size == 1 or divides) and (wanted is None or size in wanted):
            yield size


def tune(
    job: Job,
    ranks: int,
    schedule: Scheduler,
    *,
    choices: Sequence[ParallelSizes] | None = None,
    reuse: Reuse | None = None,
    disk: DiskCache | None = None,
    balance: Probes | None = None,
) -> tuple[Candidate, ...]:
    """All choices that fit, fastest first.

    Args:
        job: what is trained.
        ranks: devices in all.
        schedule: makes a pipeline's schedule.
        choices: the parallel sizes to try; all that fill `ranks` by default.
        reuse: where emulated results are kept.
        disk: those of earlier runs.
        balance: brief searches by which the fastest few have their cut searched as well.

    Raises:
        InfeasibleError: nothing fits.
    """
    tried = tuple(
        choices
        if choices is not None
        else parallel_choices(ranks, len(job.microbatches), job.device, job.model)
    )
    shared = reuse or Reuse()
    found: list[Candidate] = []
    refusals: list[str] = []
    for parallel in tried:
        try:
            found.append(evaluate(job, parallel, schedule, reuse=shared, disk=disk))
        except (InfeasibleError, ConfigError) as error:
            refusals.append(str(error))
            _log.info("%s does not fit: %s", parallel, error)
    if not found:
        raise InfeasibleError(
            f"tune: none of {len(tried)} choices of parallel sizes for {ranks} ranks fits into "
            f"{job.device.spec.memory_bytes} bytes; use more ranks or a smaller model"
            + (f" (the last one: {refusals[-1]})" if refusals else "")
        )
    found.sort(key=lambda one: one.report.iteration_ns)
    if balance is not None:
        found[:_BALANCED] = [
            evaluate(job, one.parallel, schedule, reuse=shared, disk=disk, balance=balance)
            for one in found[:_BALANCED]
        ]
        found.sort(key=lambda one: one.report.iteration_ns)
    return tuple(found)


def evaluate(
    job: Job,
    parallel: ParallelSizes,
    schedule: Scheduler,
    *,
    reuse: Reuse | None = None,
    disk: DiskCache | None = None,
    partition: Partition | None = None,
    balance: Probes | None = None,
) -> Candidate:
    """One choice of parallel sizes: B_i and K_i by the paper's rules, schedules, step.

    Args:
        job: what is trained.
        parallel: the sizes.
        schedule: makes a pipeline's schedule.
        reuse: where emulated results are kept.
        disk: those of earlier runs.
        partition: B_i and K_i, where they are given.
        balance: brief searches by which segments and layers per stage are searched from there.

    Raises:
        InfeasibleError: it does not fit into memory.
        ConfigError: the sizes do not fit the batch or the model.
    """
    _check_sizes(job, parallel)
    options = replace(job.options, parallel=parallel)
    costs = AnalyticCostModel(
        job.device, options, reuse=reuse, strategies=job.strategies, disk=disk
    )
    typical = max(job.microbatches, key=lambda one: sum(map(len, one.items.values())))
    cut = partition or partition_model(
        job.model,
        parallel.pipeline,
        costs,
        typical,
        sub_microbatch=job.sub_microbatch,
        segments=job.segments,
    )
    layered = PerLayerCosts(costs, job.strategies, job.candidates)
    found = None if balance is None else _balanced(job, options, cut, costs, layered, balance)
    if found is not None:
        cut = replace(cut, layout=found.layout)
    replicas = [
        BatchMetadata(microbatches=job.microbatches[index :: parallel.data])
        for index in range(parallel.data)
    ]
    # Replicas wait for each other when they exchange gradients: the one with most work decides.
    heaviest = max(replicas, key=lambda batch: batch_flops(job, batch, cut))
    reserve = working_bytes(job, heaviest, cut, costs)
    workload = make_workload(
        heaviest,
        job.model,
        cut.layout,
        cut.sub_microbatch,
        layered,
        _capacity_bytes(job, options, cut.layout, reserve),
        parallel=parallel,
        element_bytes=options.element_bytes,
    )
    report = emulate_step(
        schedule=schedule(workload.problem),
        model=job.model,
        layout=cut.layout,
        costs=costs,
        # All replicas take as long as the heaviest one, with what they have to do on average.
        model_flops=sum(batch_flops(job, batch, cut) for batch in replicas) // parallel.data,
        reserve_bytes=reserve,
        optimizer=job.optimizer,
        loads=_loads_by_pass(job, heaviest, cut),
    )
    return Candidate(parallel=parallel, partition=cut, report=report, balance=found)


def _capacity_bytes(
    job: Job, options: RunOptions, layout: ChunkLayout, reserve: int
) -> tuple[int, ...]:
    states = rank_state_bytes(job.model, layout, options, job.optimizer)
    return activation_capacity_bytes(job.device.spec.memory_bytes, states, reserve)


def _balanced(
    job: Job,
    options: RunOptions,
    cut: Partition,
    costs: AnalyticCostModel,
    layered: PerLayerCosts,
    probes: Probes,
) -> Balance:
    """The cut by schedules of batches that are drawn from the job's microbatches."""
    every = BatchMetadata(microbatches=job.microbatches)

    def capacity_bytes(layout: ChunkLayout) -> tuple[int, ...]:
        reserve = working_bytes(job, every, replace(cut, layout=layout), costs)
        return _capacity_bytes(job, options, layout, reserve)

    bench = Workbench(
        model=job.model,
        sub_microbatch=cut.sub_microbatch,
        costs=layered,
        capacity_bytes=capacity_bytes,
        parallel=options.parallel,
        element_bytes=options.element_bytes,
    )
    count = len(job.microbatches) // options.parallel.data
    return balance_layout(
        cut.layout, bench, job.microbatches, count, probes, Fixed(segments=frozenset(job.segments))
    )


def _loads_by_pass(job: Job, batch: BatchMetadata, partition: Partition) -> dict[PassKey, Load]:
    found: dict[PassKey, Load] = {}
    for index, one in enumerate(batch.microbatches):
        alone = BatchMetadata(microbatches=(one,))
        counts: dict[str, int] = {}
        for name, load in loads(alone, job.model, partition.sub_microbatch):
            sub = counts.get(name, 0)
            counts[name] = sub + 1
            found[PassKey(index, name, sub)] = load
    return found


def batch_flops(job: Job, batch: BatchMetadata, partition: Partition) -> int:
    """Model FLOPs of training on `batch`."""
    counts: dict[object, int] = {}
    total = 0
    for key in loads(batch, job.model, partition.sub_microbatch):
        if key not in counts:
            name, load = key
            counts[key] = training_flops(job.model.module(name), load, job.options)
        total += counts[key]
    return total


def working_bytes(
    job: Job, batch: BatchMetadata, partition: Partition, costs: AnalyticCostModel
) -> int:
    """The most memory that any stage needs for a while, beyond what its strategy holds."""
    shapes = tuple(_stage_shapes(partition.layout))
    return max(
        costs.working_bytes(job.model.module(name), shape, load)
        for name, load in set(loads(batch, job.model, partition.sub_microbatch))
        for module, shape in shapes
        if module == name
    )


def _stage_shapes(layout: ChunkLayout) -> Iterator[tuple[str, StageShape]]:
    seen = set()
    for cut in layout.modules:
        for shape in module_stages(cut):
            alike = (cut.module, shape.layers, shape.is_first, shape.is_last)
            if alike not in seen:
                seen.add(alike)
                yield cut.module, shape


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(one for one in range(1, number + 1) if number % one == 0)
