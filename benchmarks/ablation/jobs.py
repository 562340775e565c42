"""The paper's setups on an emulated H800, with batches of drawn images or clips."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from megatron_pipeweaver.cli.job_files import SYNTHETIC
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.problem import Problem, Strategy
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.partition.candidates import PerLayerCosts
from megatron_pipeweaver.partition.offline import Partition, partition_model
from megatron_pipeweaver.partition.tune import Job, working_bytes
from megatron_pipeweaver.partition.workload import make_workload
from megatron_pipeweaver.semu.devices import DeviceProfile, load_device
from megatron_pipeweaver.semu.interface import CostModel, Load, StageShape
from megatron_pipeweaver.semu.memory import (
    OptimizerOptions,
    activation_capacity_bytes,
    rank_state_bytes,
)
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import Setup, setup_preset

TOKENS = 8192
STRATEGIES = (LayerStrategy.KEEP, LayerStrategy.RECOMPUTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One setup and the batches of a short run of it."""

    setup: Setup
    device: DeviceProfile
    options: RunOptions
    costs: AnalyticCostModel
    batches: tuple[BatchMetadata, ...]

    @property
    def model(self) -> ModelSpec:
        """The modules."""
        return self.setup.model

    @property
    def pipeline_size(self) -> int:
        """Pipeline ranks."""
        return self.setup.parallel.pipeline

    def typical(self) -> MicrobatchMetadata:
        """The fullest microbatch of the first batch: what B_i and K_i are chosen for."""
        return max(self.batches[0].microbatches, key=lambda one: one.sequence_length + _items(one))


def load_bench(name: str, batches: int, microbatches: int, device: str = "H800") -> Bench:
    """Setup `name` with `batches` batches of `microbatches` microbatches."""
    setup = setup_preset(name)
    profile = load_device(device)
    options = RunOptions(parallel=setup.parallel)
    return Bench(
        setup=setup,
        device=profile,
        options=options,
        costs=AnalyticCostModel(profile, options, strategies=STRATEGIES),
        batches=tuple(
            BatchMetadata(microbatches=draw(setup.model, microbatches, seed))
            for seed in range(batches)
        ),
    )


def draw(model: ModelSpec, count: int, seed: int) -> tuple[MicrobatchMetadata, ...]:
    """0 to 48 images beside 8192 tokens each, or clips of 4 to 16 s in all, as in the paper."""
    if model.modules[0].name == "vision":
        return SYNTHETIC["images"].draw(count, seed)
    source = random.Random(seed)
    return tuple(_clips(source) for _ in range(count))


def _clips(source: random.Random) -> MicrobatchMetadata:
    """Clips of 1 to 16 s, one prompt of 256 tokens each; 16 s are 8192 patches, 512 a second."""
    seconds = source.randint(4, 16)
    clips: list[int] = []
    while seconds > sum(clips) and len(clips) < 8:
        clips.append(source.randint(1, seconds - sum(clips)))
    lengths = tuple(512 * one for one in clips)
    return MicrobatchMetadata(
        sequence_length=sum(lengths),
        items={"text": (Item(units=256, tokens=256),) * len(clips)},
        document_lengths=lengths,
    )


def partition(
    bench: Bench,
    sub_microbatch: Mapping[str, int] | None = None,
    segments: Mapping[str, int] | None = None,
) -> Partition:
    """The paper's partitioner: modules in segments of their own; B_i and K_i where given."""
    return partition_model(
        bench.model,
        bench.pipeline_size,
        bench.costs,
        bench.typical(),
        sub_microbatch=sub_microbatch,
        segments=segments,
    )


def capacity(bench: Bench, cut: Partition) -> tuple[int, ...]:
    """Bytes for activations by rank, the same for all batches of a run."""
    job = Job(
        model=bench.model,
        device=bench.device,
        microbatches=bench.batches[0].microbatches,
        options=bench.options,
        strategies=STRATEGIES,
    )
    every = BatchMetadata(
        microbatches=tuple(one for batch in bench.batches for one in batch.microbatches)
    )
    return activation_capacity_bytes(
        bench.device.spec.memory_bytes,
        rank_state_bytes(bench.model, cut.layout, bench.options, OptimizerOptions()),
        working_bytes(job, every, cut, bench.costs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OneSetting:
    """A `CostModel` of a whole run's one setting: this share of a stage's layers is recomputed.

    So do Megatron's ``--recompute-method block --recompute-num-layers N``.
    """

    costs: AnalyticCostModel
    recomputed: float

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        """The one strategy."""
        return (whole_run_strategy(self.costs, module, stage, load, self.recomputed),)

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """Time of a message between neighbouring pipeline ranks."""
        return self.costs.p2p_latency_ns(size_bytes)


def whole_run_strategy(
    costs: AnalyticCostModel, module: ModuleSpec, stage: StageShape, load: Load, recomputed: float
) -> Strategy:
    """A stage of which this share of the layers, rounded up, is recomputed."""
    again = ceil(recomputed * stage.layers)
    choice = [LayerStrategy.RECOMPUTE] * again + [LayerStrategy.KEEP] * (stage.layers - again)
    return costs.layer_strategies(module, stage, load, STRATEGIES).strategy(choice)


def separated_problem(
    bench: Bench,
    batch: BatchMetadata,
    cut: Partition,
    capacity_bytes: Sequence[int],
    recomputed: float | None = None,
) -> Problem:
    """The problem of `batch` under the paper's partitioner.

    Stages choose from candidates layer by layer, or all do the same if `recomputed` is given.
    """
    costs: CostModel = PerLayerCosts(bench.costs, STRATEGIES)
    if recomputed is not None:
        costs = OneSetting(costs=bench.costs, recomputed=recomputed)
    return make_workload(
        batch,
        bench.model,
        cut.layout,
        cut.sub_microbatch,
        costs,
        capacity_bytes,
        parallel=bench.setup.parallel,
        element_bytes=bench.options.element_bytes,
    ).problem


def _items(one: MicrobatchMetadata) -> int:
    return sum(len(items) for items in one.items.values())
