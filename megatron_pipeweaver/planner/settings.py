"""Everything a planner is made from, as one value that can travel to another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import digest, to_bytes
from megatron_pipeweaver.ir.json_reader import parse_json
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.partition.candidates import DEFAULT_CANDIDATES, PerLayerCosts
from megatron_pipeweaver.planner.codec import from_json, to_json
from megatron_pipeweaver.planner.feedback import CorrectedCosts, Corrections
from megatron_pipeweaver.planner.headroom import usable_bytes
from megatron_pipeweaver.planner.host import HostMemory
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.semu.devices import DeviceProfile
from megatron_pipeweaver.semu.interface import CostModel
from megatron_pipeweaver.semu.model import DEFAULT_STRATEGIES, AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions

SPLIT_OVERHEAD_PERMILLE = 84
"""What a split backward takes beyond one in one piece, in thousandths of that, until measured.

The median of `benchmarks/runtime/results/split.csv`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """SEMU's analytic cost model: the device, how layers run on it, what each of them may keep.

    `candidates` is the paper's S: how many ways to run a stage pair the search chooses from.
    """

    device: DeviceProfile
    options: RunOptions
    strategies: tuple[LayerStrategy, ...] = DEFAULT_STRATEGIES
    candidates: int = DEFAULT_CANDIDATES

    def make(self) -> PerLayerCosts:
        """The cost model."""
        analytic = AnalyticCostModel(self.device, self.options, strategies=self.strategies)
        return PerLayerCosts(analytic, self.strategies, self.candidates)

    @property
    def offload(self) -> bool:
        """Whether activations may wait in host memory."""
        return LayerStrategy.OFFLOAD in self.strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """One pipeline's planner; the fields are those of `Planner`.

    `split_overhead_permille` is what a split backward takes beyond one in one piece, in thousandths
    of that, until it was measured in training.
    Splits above 100 percent need memory set aside for what their layers work with for a while.
    `host_memory_bytes` is what offloaded activations may take of each rank's host memory; there is
    no bound where it is left out.
    """

    model: ModelSpec
    layout: ChunkLayout
    costs: CostSettings
    sub_microbatch: Mapping[str, int]
    memory_capacity_bytes: tuple[int, ...]
    dtypes: Mapping[str, str]
    search: SearchConfig
    splits_percent: tuple[int, ...] = (100,)
    split_overhead_permille: int = SPLIT_OVERHEAD_PERMILLE
    host_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.split_overhead_permille < 0:
            raise ConfigError(
                f"planner: a split overhead of {self.split_overhead_permille} permille; need >= 0"
            )

    def make(
        self,
        costs: PerLayerCosts | None = None,
        usable_permille: tuple[int, ...] = (),
        corrections: Corrections | None = None,
    ) -> Planner:
        """The planner in the usable share of each rank's memory.

        Args:
            costs: what stages cost, made anew where left out.
            usable_permille: of each rank's memory, all of it where left out.
            corrections: what measured times have taught.
        """
        costs = self.costs.make() if costs is None else costs
        overhead = self.split_overhead_permille

        def lean(permille: int, apart: bool) -> CostModel:
            return CorrectedCosts(
                costs.within(permille), corrections, overhead_permille=overhead if apart else None
            )

        host = None
        if self.host_memory_bytes is not None and self.costs.offload:
            host = HostMemory(limit_bytes=self.host_memory_bytes, costs=costs, lean=lean)
        return Planner(
            model=self.model,
            layout=self.layout,
            costs=CorrectedCosts(costs, corrections),
            apart_costs=CorrectedCosts(costs, corrections, overhead_permille=overhead),
            sub_microbatch=self.sub_microbatch,
            memory_capacity_bytes=usable_bytes(self.memory_capacity_bytes, usable_permille),
            dtypes=self.dtypes,
            search=self.search,
            parallel=self.costs.options.parallel,
            splits_percent=self.splits_percent,
            host=host,
        )

    def with_threads(self, most: int) -> PlannerSettings:
        """These settings with at most `most` search threads."""
        threads = min(self.search.threads, max(1, most))
        return dataclasses.replace(self, search=dataclasses.replace(self.search, threads=threads))

    @property
    def digest(self) -> str:
        """Equal for equal settings."""
        return digest(settings_to_json(self))


def settings_to_json(settings: PlannerSettings) -> bytes:
    """`settings` as canonical bytes."""
    return to_bytes(to_json(settings))


def settings_from_json(data: bytes, source: str = "planner settings") -> PlannerSettings:
    """The settings in `data`.

    Raises:
        ConfigError: the bytes are not what `settings_to_json` writes.
    """
    return from_json(parse_json(data, source), PlannerSettings)
