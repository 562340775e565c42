"""From what a batch holds to a verified plan: the whole left half of the house in one function.

Pure: the same metadata, settings and clock give the same plan. Where it runs (in the training
process, in one of its own) is not its business.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from megatron_pipeweaver._core import Stop
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.compiler.lowering import compile_plan
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.plan import ELEMENT_BYTES, VerifiedPlan
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.partition.workload import Workload, make_workload
from megatron_pipeweaver.planner.fallback import static_schedule
from megatron_pipeweaver.planner.host import HostMemory, HostUse
from megatron_pipeweaver.planner.splits import (
    STEPS,
    Alternative,
    Sizes,
    check_percents,
    fitting,
    search_alternatives,
    split_sizes,
)
from megatron_pipeweaver.semu.interface import CostModel


class PlanOrigin(StrEnum):
    """How a plan's schedule was found."""

    SEARCHED = "searched"
    STATIC = "static"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedIteration:
    """A verified plan and where it comes from.

    `baselines` maps the name of a static schedule to its emulated makespan (ns) on the same
    problem; `search_ns` is the wall-clock time from metadata to plan; `sub_microbatch` is the split
    that was chosen, None where it came from another process.
    """

    plan: VerifiedPlan
    problem: Problem
    schedule: Schedule
    baselines: Mapping[str, int]
    search_ns: int
    origin: PlanOrigin = PlanOrigin.SEARCHED
    sub_microbatch: Mapping[str, int] | None = None


class Planner:
    """Plans one pipeline's iterations.

    Args:
        model: the model's modules.
        layout: where their layers live.
        costs: SEMU's answer to "how long, how much memory" for a stage under a load.
        sub_microbatch: items per sub-microbatch (the paper's B_i), by module.
        memory_capacity_bytes: what each pipeline rank has for activations.
        dtypes: element type of the tensors that leave a module's stages, by module.
        search: how long and how hard to search.
        parallel: tensor, sequence and context parallel sizes, on which the tensors' shapes depend.
        apart_costs: the same where weight gradients run in ops of their own, with what that takes
            beyond its parts. Each batch is then split, or not, as is shorter. Without it every
            batch is split where `search` says so, and free of overhead.
        splits_percent: sub-microbatch sizes to choose from, batch by batch, in percent of
            `sub_microbatch`; evaluation and static plans use the first one.
        host: what offloaded activations may take of a rank's host memory; no bound without it.
        clock: monotonic nanoseconds.

    Raises:
        ConfigError: a module has no element type, or one that cannot cross rank borders; or
            `splits_percent` is empty, below 1, or of several sizes in a deterministic search.
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        layout: ChunkLayout,
        costs: CostModel,
        sub_microbatch: Mapping[str, int],
        memory_capacity_bytes: Sequence[int],
        dtypes: Mapping[str, str],
        search: SearchConfig,
        parallel: ParallelSizes | None = None,
        apart_costs: CostModel | None = None,
        splits_percent: Sequence[int] = (100,),
        host: HostMemory | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        check_percents(splits_percent, search)
        self.model = model
        self.layout = layout
        self._costs = costs
        self._apart_costs = apart_costs
        self._splits = split_sizes(sub_microbatch, splits_percent)
        self._memory_capacity_bytes = tuple(memory_capacity_bytes)
        self._dtypes = dict(dtypes)
        self._element_bytes = _widest(model, dtypes)
        self._search = search
        self.parallel = parallel
        self._host = host
        self._clock = clock

    def plan(
        self,
        batch: BatchMetadata,
        *,
        forward_only: bool = False,
        budget_ns: int | None = None,
        stop: Stop | None = None,
    ) -> PlannedIteration:
        """The best plan found for `batch` within the search budget.

        Args:
            batch: what this pipeline's microbatches hold.
            forward_only: plan an evaluation step, without any backward.
            budget_ns: search no longer than this, where that is less than the settings allow.
            stop: ends the search early, from any thread, with the best plan found so far.

        Raises:
            ConfigError: the batch does not fit the model (an unknown module, say).
            InfeasibleError: a microbatch alone does not fit into a rank's memory.
        """
        start_ns = self._clock()
        search = self._search
        if budget_ns is not None:
            search = dataclasses.replace(
                search, time_budget_ns=max(0, min(budget_ns, search.time_budget_ns))
            )
        found = search_alternatives(
            self._alternatives(
                batch,
                self._splits[:1] if forward_only else self._splits,
                forward_only=forward_only,
            ),
            search,
            stop,
        )
        return self._compiled(
            found.of.workload,
            found.result.schedule,
            found.result.baselines,
            forward_only=forward_only,
            start_ns=start_ns,
            origin=PlanOrigin.SEARCHED,
            sub_microbatch=found.of.sizes,
        )

    def static_plan(self, batch: BatchMetadata, *, forward_only: bool = False) -> PlannedIteration:
        """The best static plan for `batch`, without any search.

        Raises:
            ConfigError: the batch does not fit the model (an unknown module, say).
            InfeasibleError: a microbatch alone does not fit into a rank's memory.
        """
        start_ns = self._clock()

        def static(one: Alternative) -> tuple[Workload, Schedule, Mapping[str, int]]:
            search = dataclasses.replace(self._search, split_weight_grad=one.apart)
            return one.workload, *static_schedule(one.workload.problem, search)

        alternatives = self._alternatives(batch, self._splits[:1], forward_only=forward_only)
        workload, schedule, baselines = min(
            fitting(alternatives, static, lambda made: made[1]),
            key=lambda made: made[1].makespan_ns,
        )
        return self._compiled(
            workload,
            schedule,
            baselines,
            forward_only=forward_only,
            start_ns=start_ns,
            origin=PlanOrigin.STATIC,
            sub_microbatch=self._splits[0],
        )

    def workload(
        self,
        batch: BatchMetadata,
        *,
        forward_only: bool = False,
        sub_microbatch: Mapping[str, int] | None = None,
        apart: bool = False,
    ) -> Workload:
        """The scheduling problem of `batch`, split into `sub_microbatch` or else the first split.

        With `apart`, in the times of weight gradients that run in ops of their own.

        Raises:
            ConfigError: the batch does not fit the model (an unknown module, say).
        """
        costs = self._apart_costs if apart else None
        return self._workload(
            batch,
            self._costs if costs is None else costs,
            self._splits[0] if sub_microbatch is None else sub_microbatch,
            forward_only=forward_only,
        )

    def _workload(
        self, batch: BatchMetadata, costs: CostModel, sizes: Sizes, *, forward_only: bool
    ) -> Workload:
        return make_workload(
            batch,
            self.model,
            self.layout,
            sizes,
            costs,
            self._memory_capacity_bytes,
            forward_only=forward_only,
            parallel=self.parallel,
            element_bytes=self._element_bytes,
        )

    def _alternatives(
        self, batch: BatchMetadata, splits: Sequence[Sizes], *, forward_only: bool
    ) -> list[Alternative]:
        """What there is to choose from: weight gradients in one piece first, then apart."""
        may = self._search.split_weight_grad and not forward_only
        ways = (False, True) if may and self._apart_costs is not None else (may,)
        return [
            self._bounded(
                batch,
                Alternative(
                    sizes=sizes,
                    workload=self.workload(
                        batch, forward_only=forward_only, sub_microbatch=sizes, apart=apart
                    ),
                    apart=apart,
                ),
            )
            for sizes in splits
            for apart in ways
        ]

    def _bounded(self, batch: BatchMetadata, one: Alternative) -> Alternative:
        """`one`, and where it could fill the host's memory, what to try instead when it does."""
        if self._host is None:
            return one
        use = HostUse(
            one.workload.problem, batch, self.model, self.layout, one.sizes, self._host.costs
        )
        if max(use.most_bytes()) <= self._host.limit_bytes:
            return one
        return dataclasses.replace(one, leaner=partial(self._leaner, batch, one, use, 0))

    def _leaner(
        self, batch: BatchMetadata, one: Alternative, use: HostUse, step: int, schedule: Schedule
    ) -> Alternative | None:
        """What to try instead of `schedule`, found behind so many steps; `None` where it fits."""
        assert self._host is not None  # else nothing is bounded
        limit_bytes, peak = self._host.limit_bytes, max(use.peak_bytes(schedule))
        if peak <= limit_bytes:
            return None
        if step == STEPS - 1:
            raise InfeasibleError(
                f"offloaded activations need {peak} bytes of a rank's host memory, and it may "
                f"take {limit_bytes}; give more, or allow another strategy"
            )
        # At first by what was on the host at one time, then by all that could be.
        reached = max(use.most_bytes()) if step else peak
        costs = self._host.lean(1000 * limit_bytes // reached, one.apart)
        return dataclasses.replace(
            one,
            workload=self._workload(batch, costs, one.sizes, forward_only=False),
            leaner=partial(self._leaner, batch, one, use, step + 1),
        )

    def _compiled(
        self,
        workload: Workload,
        schedule: Schedule,
        baselines: Mapping[str, int],
        *,
        forward_only: bool,
        start_ns: int,
        origin: PlanOrigin,
        sub_microbatch: Mapping[str, int],
    ) -> PlannedIteration:
        check_schedule(workload.problem, schedule)
        plan = compile_plan(
            workload.problem, schedule, workload.payloads, self._dtypes, forward_only=forward_only
        )
        return PlannedIteration(
            plan=verify(plan),
            problem=workload.problem,
            schedule=schedule,
            baselines=baselines,
            search_ns=self._clock() - start_ns,
            origin=origin,
            sub_microbatch=sub_microbatch,
        )


def _widest(model: ModelSpec, dtypes: Mapping[str, str]) -> int:
    """Bytes per element of the widest type among the modules' tensors."""
    for module in model.modules:
        found = dtypes.get(module.name)
        if found not in ELEMENT_BYTES:
            raise ConfigError(
                f"planner: the element type of module {module.name!r} is {found!r}; "
                f"give one of {sorted(ELEMENT_BYTES)}"
            )
    return max(ELEMENT_BYTES[dtypes[module.name]] for module in model.modules)


def batch_digest(batch: BatchMetadata) -> str:
    """A digest that two ranks share exactly when they hold equal metadata."""
    rows = [
        (
            one.sequence_length,
            one.samples,
            [
                (name, [(item.units, item.tokens) for item in one.items[name]])
                for name in sorted(one.items)
            ],
            one.document_lengths,
        )
        for one in batch.microbatches
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()
