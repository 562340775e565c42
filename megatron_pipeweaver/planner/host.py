"""Host memory that plans may fill with offloaded activations: a bound that no plan exceeds.

What a node has is known at the start, and each of its ranks gets an even share. A batch whose
activations would fit there all at once needs no bound. A schedule of any other that holds too much
is refused, and one is sought in a problem with fewer candidates:

    whole   | every candidate
    leaner  | as much less per stage pair as that schedule held too much
    leanest | as much as fits when all of it is on the host at one time: no schedule holds too much
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.problem import OpKind, PassKey, Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.partition.workload import loads
from megatron_pipeweaver.semu.interface import CostModel, Load, StageShape
from megatron_pipeweaver.semu.stages import canonical_stage, module_stages


class HostCosts(Protocol):
    """A cost model that knows what waits in host memory."""

    def host_bytes(
        self, module: ModuleSpec, stage: StageShape, load: Load, strategy: str | None
    ) -> int:
        """Bytes that a stage pair keeps in its rank's host memory under the strategy so named.

        `None` stands for the most that any strategy keeps there.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """What every rank may hold in host memory, and who knows what strategies hold there.

    ``lean(permille, apart)`` is a cost model whose stage pairs hold so many thousandths of the most
    that they could; `apart` as in `Planner`.

    Raises:
        ConfigError: the limit is negative.
    """

    limit_bytes: int
    costs: HostCosts
    lean: Callable[[int, bool], CostModel]

    def __post_init__(self) -> None:
        if self.limit_bytes < 0:
            raise ConfigError(f"host memory: {self.limit_bytes} bytes a rank; need >= 0")


class HostUse:
    """What the stage pairs of one problem hold on the host; those of frozen passes hold nothing.

    Args:
        problem: made from the rest.
        batch: what the iteration holds.
        model: the modules.
        layout: their cuts.
        sub_microbatch: B_i.
        costs: says what one stage pair holds.
    """

    def __init__(
        self,
        problem: Problem,
        batch: BatchMetadata,
        model: ModelSpec,
        layout: ChunkLayout,
        sub_microbatch: Mapping[str, int],
        costs: HostCosts,
    ) -> None:
        self._graph = problem.graph
        keys = [
            PassKey(index, one.module, one.sub_microbatch)
            for index, microbatch in enumerate(problem.microbatches)
            for one in microbatch.passes
        ]
        shapes = {
            cut.module: tuple(
                canonical_stage(model.module(cut.module), stage) for stage in module_stages(cut)
            )
            for cut in layout.modules
        }
        alike: dict[tuple[str, Load], _Pairs] = {}
        self._pairs: dict[PassKey, _Pairs] = {}
        # Both follow the batch, microbatch by microbatch and module by module.
        for key, (name, load) in zip(keys, loads(batch, model, sub_microbatch), strict=True):
            if not self._graph.nodes[key].frozen:
                made = _Pairs(costs, model.module(name), shapes[name], load)
                self._pairs[key] = alike.setdefault((name, load), made)

    def most_bytes(self) -> tuple[int, ...]:
        """Per rank, what it would hold if everything waited on the host at the same time."""
        most = [0] * self._graph.pipeline_size
        for pairs, count in Counter(self._pairs.values()).items():
            for stage in range(pairs.stages):
                most[self._graph.rank_of(stage)] += count * pairs.held_bytes(stage, None)
        return tuple(most)

    def peak_bytes(self, schedule: Schedule) -> tuple[int, ...]:
        """Per rank, the most that waits on the host at any time, from forwards to backwards."""
        peaks = []
        for ops in schedule.ranks:
            held = peak = 0
            for op in ops:
                pairs = self._pairs.get(op.key.owner)
                if pairs is not None and op.key.kind is not OpKind.W:
                    moved = pairs.held_bytes(op.key.stage, op.strategy)
                    held += moved if op.key.kind is OpKind.F else -moved
                    peak = max(peak, held)
            peaks.append(peak)
        return tuple(peaks)


class _Pairs:
    """The stage pairs of all passes with one load; each is asked for once."""

    def __init__(
        self, costs: HostCosts, module: ModuleSpec, shapes: Sequence[StageShape], load: Load
    ) -> None:
        self._costs = costs
        self._module = module
        self._shapes = shapes
        self._load = load
        self._found: dict[tuple[int, str | None], int] = {}

    @property
    def stages(self) -> int:
        """How many stages a pass has."""
        return len(self._shapes)

    def held_bytes(self, stage: int, strategy: str | None) -> int:
        """As `HostCosts.host_bytes`."""
        found = self._found.get((stage, strategy))
        if found is None:
            shape = self._shapes[stage]
            found = self._costs.host_bytes(self._module, shape, self._load, strategy)
            self._found[stage, strategy] = found
        return found
