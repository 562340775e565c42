"""Where the schedule function gets its plans: the seam between training and planning.

    request(batch t+1) ... iteration t trains ... collect(batch t+1) -> plan

`InProcessSource` plans when it is asked, on the critical path; `background.BackgroundSource` has a
process of its own for that.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.plan import VerifiedPlan
from megatron_pipeweaver.ir.trace import ActionTimes
from megatron_pipeweaver.planner.headroom import MemoryPeak
from megatron_pipeweaver.planner.planner import PlannedIteration, Planner, batch_digest
from megatron_pipeweaver.planner.sharing import own_part
from megatron_pipeweaver.planner.wire import ReceivedPlan, encode

_WAITS_KEPT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCounters:
    """What became of the plans so far.

    `planned` iterations ran a plan from the planner and `static` ones a static plan, because the
    planner was `late`, or had `failed` (died, hung, or answered with what is no plan for the
    batch), or could not be asked at all. `cached` counts those planned iterations whose plan was
    there from an earlier one; `restarted` the planner's new starts. `waits_ns` are how long
    training stood still for the latest ones.
    """

    planned: int = 0
    static: int = 0
    cached: int = 0
    late: int = 0
    failed: int = 0
    restarted: int = 0
    waits_ns: tuple[int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return (
            f"{self.planned} iterations planned ({self.cached} from the cache), "
            f"{self.static} by static plans; planner late {self.late}, failed {self.failed}, "
            f"restarted {self.restarted} times; training waited "
            f"{median(self.waits_ns or (0,)) / 1e6:.1f} ms for a plan (median)"
        )

    def plus(self, *, wait_ns: int | None = None, **more: int) -> PlanCounters:
        """These counters with `more` on top, and with one more wait."""
        now: dict[str, Any] = {name: getattr(self, name) + count for name, count in more.items()}
        if wait_ns is not None:
            now["waits_ns"] = (*self.waits_ns, wait_ns)[-_WAITS_KEPT:]
        return dataclasses.replace(self, **now)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAnswer:
    """A plan as it goes to all ranks, and what the planning rank knows besides.

    `received` is the same plan, decoded, where that was done already; `planned` makes the problem
    and the schedule behind it, which takes a while, where they are known.
    """

    data: bytes
    received: ReceivedPlan | None
    planned: Callable[[], PlannedIteration | None]


Heard = Callable[[PlanAnswer], None]
"""Is told of a plan as soon as it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RanPlan:
    """An iteration that has run: by `answer`, of which this replica ran its `own` part.

    `peaks` are the ranks' memory peaks, where they were measured.
    """

    answer: PlanAnswer
    made: VerifiedPlan
    own: VerifiedPlan
    times: ActionTimes
    peaks: tuple[MemoryPeak, ...] = ()


class PlanSource(Protocol):
    """Makes plans on the planning rank; on other ranks it is asked for none."""

    @property
    def layout(self) -> ChunkLayout:
        """Where the layers live that are planned for."""
        ...

    @property
    def counters(self) -> PlanCounters:
        """What became of the plans so far."""
        ...

    def own_part(self, shared: VerifiedPlan, batch: BatchMetadata) -> VerifiedPlan:
        """What the replica with `batch` runs of a plan for several, on any rank (`sharing`).

        Raises:
            PipeWeaverError: the plan was not made for `batch` among others.
        """
        ...

    @property
    def plans_ahead(self) -> bool:
        """Whether plans may be there before they are collected; the same on all ranks."""
        ...

    def request(
        self, batch: BatchMetadata, *, forward_only: bool, heard: Heard | None = None
    ) -> None:
        """Say that a plan for `batch` will be collected; returns at once and raises nothing.

        `heard` is called, in whatever thread, once there is one.
        """
        ...

    def collect(self, batch: BatchMetadata, *, forward_only: bool) -> PlanAnswer:
        """A plan for exactly `batch`, whether it was requested before or not.

        Raises:
            PipeWeaverError: there is none, not even a static one.
        """
        ...

    def observe(self, batch: BatchMetadata, *, forward_only: bool, ran: RanPlan) -> None:
        """Tell how long the stages of `batch` really took; raises nothing."""
        ...

    def close(self) -> None:
        """Let go of everything; a closed source is asked no more."""
        ...


class InProcessSource:
    """Plans in the training process, while it waits; a `PlanSource`.

    Args:
        planner: makes the plans.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._counters = PlanCounters()

    @property
    def layout(self) -> ChunkLayout:
        """Where the layers live that are planned for."""
        return self.planner.layout

    @property
    def counters(self) -> PlanCounters:
        """What became of the plans so far."""
        return self._counters

    def own_part(self, shared: VerifiedPlan, batch: BatchMetadata) -> VerifiedPlan:
        """What the replica with `batch` runs of a plan for several."""
        return own_part(shared, batch, self.planner.model, self.planner.parallel)

    @property
    def plans_ahead(self) -> bool:
        """Never."""
        return False

    def request(
        self, batch: BatchMetadata, *, forward_only: bool, heard: Heard | None = None
    ) -> None:
        """Does nothing: there is nobody to plan meanwhile."""

    def collect(self, batch: BatchMetadata, *, forward_only: bool) -> PlanAnswer:
        """The plan, after the whole search."""
        started_ns = time.monotonic_ns()
        planned = self.planner.plan(batch, forward_only=forward_only)
        self._counters = self._counters.plus(planned=1, wait_ns=time.monotonic_ns() - started_ns)
        return PlanAnswer(
            data=encode(planned, batch_digest(batch)), received=None, planned=lambda: planned
        )

    def observe(self, batch: BatchMetadata, *, forward_only: bool, ran: RanPlan) -> None:
        """Does nothing: the plans follow the cost model as it was given."""

    def close(self) -> None:
        """Does nothing."""
