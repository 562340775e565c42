"""Segments and layers per stage, chosen by the schedules that come of them, once before training.

The paper's rule (`offline`) gives every module ``K_i = floor(T_i / T_1)`` segments and every stage
nearly as many layers. What that costs shows in schedules alone: the first rank holds activations
longest and recomputes for it, the last one has the head to work on, short segments fill bubbles and
hold less. So the cut is walked from there, over expected batches that are scheduled briefly:

    paper's cut ─► one segment more or less, ... ─► one layer from a busy rank to an idle one, ...
                     (the best neighbour, while there is one that is clearly better)

and what the walks end with stands only if it is clearly better on batches that they did not see.
All of it counts rounds and never reads a clock: the same arguments give the same layout anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.batch import BatchMetadata, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.partition.chunks import make_layout, segment_limits
from megatron_pipeweaver.partition.workload import make_workload
from megatron_pipeweaver.semu.interface import CostModel

_SEGMENT_GAIN_PERMILLE = 5
"""A step to other segments gains so much at least: chunks cost more than is emulated."""
_LAYER_GAIN_PERMILLE = 2
"""And a step to other layers; brief searches scatter by about one thousandth."""
_MARGIN_PERMILLE = 10
"""What is found has to be so much shorter on batches that the walks did not see."""
_HOPELESS_PERMILLE = 30
"""A layout that is so much longer on the first batch is not tried on the others."""
_MOST_STEPS = 8
"""Of either walk."""
_GIVING, _TAKING = 2, 3
"""Layers go from one of so many busiest ranks to one of so many idlest."""
_SEEN, _HELD_OUT = 2, 3
"""Batches that walks look at, and batches for the verdict."""
_MOST_MICROBATCHES = 32
"""Of a batch that layouts are judged by: longer ones cost time and tell the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a brief search ended with: the schedule's length, and every rank's time at work."""

    makespan_ns: int
    busy_ns: tuple[int, ...]


Probe = Callable[[Problem], Outcome]
"""Schedules a problem briefly, always alike; raises `InfeasibleError` where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Brief searches: `walk` compares neighbours and scatters little, `verdict` searches longer."""

    walk: Probe
    verdict: Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Modules whose number of segments, or whose layers per stage, somebody has chosen."""

    segments: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The layout that stands, and the mean makespans (ns) of the first one and of it, held out."""

    layout: ChunkLayout
    before_ns: int
    after_ns: int

    @property
    def gain(self) -> float:
        """By how much iterations get shorter, as a share."""
        return 1 - self.after_ns / self.before_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """What makes a scheduling problem of a layout and a batch; see `make_workload`.

    `capacity_bytes` is what a layout leaves each rank for activations; it raises `InfeasibleError`
    where weights and optimizer states alone do not fit.
    """

    model: ModelSpec
    sub_microbatch: Mapping[str, int]
    costs: CostModel
    capacity_bytes: Callable[[ChunkLayout], Sequence[int]]
    parallel: ParallelSizes | None = None
    element_bytes: int = 2

    def problem(self, layout: ChunkLayout, batch: BatchMetadata) -> Problem:
        """The problem of `batch` under `layout`.

        Raises:
            InfeasibleError: the layout's weights and states do not fit.
        """
        return make_workload(
            batch,
            self.model,
            layout,
            self.sub_microbatch,
            self.costs,
            self.capacity_bytes(layout),
            parallel=self.parallel,
            element_bytes=self.element_bytes,
        ).problem


def expected_batches(
    pool: Sequence[MicrobatchMetadata], microbatches: int, count: int, seed: int = 0
) -> tuple[BatchMetadata, ...]:
    """`count` batches of so many microbatches each (32 at most), drawn from `pool`."""
    source = random.Random(seed)
    size = min(microbatches, _MOST_MICROBATCHES)
    return tuple(
        BatchMetadata(microbatches=tuple(source.choices(pool, k=size))) for _ in range(count)
    )


def balance_layout(
    start: ChunkLayout,
    bench: Workbench,
    pool: Sequence[MicrobatchMetadata],
    microbatches: int,
    probes: Probes,
    fixed: Fixed = Fixed(),
) -> Balance:
    """The cut that schedules of expected batches ask for, or `start` if none is clearly better.

    Args:
        start: the paper's cut; every stage that has layers keeps one at least.
        bench: makes problems of layouts.
        pool: microbatches as training will see them, which batches are drawn from.
        microbatches: of one replica's batch.
        probes: the brief searches.
        fixed: what stays as it is.

    Raises:
        InfeasibleError: `start` does not fit.
    """
    batches = expected_batches(pool, microbatches, _SEEN + _HELD_OUT)
    seen = _Judge(bench, batches[:_SEEN], probes.walk)
    recut = _walk(seen, start, _Recuts(bench.model, fixed), _SEGMENT_GAIN_PERMILLE)
    moved = _walk(seen, recut, _LayerMoves(fixed), _LAYER_GAIN_PERMILLE)
    verdict = _Judge(bench, batches[_SEEN:], probes.verdict)
    before = verdict(start)
    found = {layout: verdict(layout) for layout in (start, recut, moved)}
    best = min(found, key=lambda layout: found[layout].makespan_ns)
    if not _shorter(found[best], before, _MARGIN_PERMILLE):
        best = start
    return Balance(
        layout=best,
        before_ns=before.makespan_ns // _HELD_OUT,
        after_ns=found[best].makespan_ns // _HELD_OUT,
    )


def _shorter(one: Outcome, other: Outcome, permille: int) -> bool:
    return 1000 * one.makespan_ns < (1000 - permille) * other.makespan_ns


class _Judge:
    """What a layout makes of some batches, summed over them; each is judged once."""

    __slots__ = ("_batches", "_bench", "_found", "_probe")

    def __init__(self, bench: Workbench, batches: Sequence[BatchMetadata], probe: Probe) -> None:
        self._bench = bench
        self._batches = batches
        self._probe = probe
        self._found: dict[tuple[ChunkLayout, int], Outcome] = {}

    def __call__(self, layout: ChunkLayout) -> Outcome:
        """Makespans and busy times, summed; `InfeasibleError` where a batch does not fit."""
        rows = [self._one(layout, index) for index in range(len(self._batches))]
        return Outcome(
            makespan_ns=sum(one.makespan_ns for one in rows),
            busy_ns=tuple(map(sum, zip(*(one.busy_ns for one in rows), strict=True))),
        )

    def promising(self, layout: ChunkLayout, best: ChunkLayout) -> bool:
        """Whether `layout` fits, and is not far longer than `best` on the first batch."""
        try:
            found = self._one(layout, 0)
        except InfeasibleError:
            return False
        return _shorter(found, self._one(best, 0), -_HOPELESS_PERMILLE)

    def _one(self, layout: ChunkLayout, index: int) -> Outcome:
        key = (layout, index)
        if key not in self._found:
            self._found[key] = self._probe(self._bench.problem(layout, self._batches[index]))
        return self._found[key]


Neighbours = Callable[[ChunkLayout, Outcome], Iterable[ChunkLayout]]


def _walk(judge: _Judge, start: ChunkLayout, neighbours: Neighbours, permille: int) -> ChunkLayout:
    """From `start` to the best neighbour, while there is one that gains so many thousandths."""
    best, outcome = start, judge(start)
    for _ in range(_MOST_STEPS):
        found: dict[ChunkLayout, Outcome] = {}
        for layout in neighbours(best, outcome):
            if layout not in found and judge.promising(layout, best):
                try:
                    found[layout] = judge(layout)
                except InfeasibleError:
                    continue
        nearest = min(found, key=lambda layout: found[layout].makespan_ns, default=best)
        if nearest is best or not _shorter(found[nearest], outcome, permille):
            break
        best, outcome = nearest, found[nearest]
    return best


class _Recuts:
    """Neighbours with a segment more or less of one module, or of all, cut evenly."""

    __slots__ = ("_free", "_model")

    def __init__(self, model: ModelSpec, fixed: Fixed) -> None:
        self._model = model
        stays = fixed.segments | fixed.layers
        self._free = [one.name for one in model.modules if one.name not in stays]

    def __call__(self, layout: ChunkLayout, outcome: Outcome) -> Iterator[ChunkLayout]:
        """See the class; `outcome` does not matter."""
        del outcome
        most = segment_limits(self._model, layout.pipeline_size)
        counts = {one.module: one.segments for one in layout.modules}
        groups = [[name] for name in self._free]
        if len(groups) > 1:
            groups.append(self._free)
        for group in groups:
            for step in (1, -1):
                wanted = counts | {name: counts[name] + step for name in group}
                if all(1 <= wanted[name] <= most[name] for name in group):
                    even = make_layout(self._model, layout.pipeline_size, wanted)
                    cuts = {one.module: one for one in even.modules if one.module in group}
                    modules = tuple(cuts.get(one.module, one) for one in layout.modules)
                    yield replace(layout, modules=modules)


class _LayerMoves:
    """Neighbours with one layer fewer on a busy rank, and one more on an idle one."""

    __slots__ = ("_fixed",)

    def __init__(self, fixed: Fixed) -> None:
        self._fixed = fixed.layers

    def __call__(self, layout: ChunkLayout, outcome: Outcome) -> Iterator[ChunkLayout]:
        """See the class; `outcome` tells how busy the ranks are."""
        ranks = sorted(range(layout.pipeline_size), key=lambda rank: -outcome.busy_ns[rank])
        for place, giving in enumerate(ranks[:_GIVING]):
            for taking in reversed(ranks[place + 1 :][-_TAKING:]):
                for cut in layout.modules:
                    moved = _moved(cut, layout.pipeline_size, giving, taking)
                    if moved is not None and cut.module not in self._fixed:
                        modules = tuple(moved if one is cut else one for one in layout.modules)
                        yield replace(layout, modules=modules)


def _moved(cut: ModuleLayout, pipeline_size: int, giving: int, taking: int) -> ModuleLayout | None:
    """`cut` with a layer moved from the longest stage of one rank to another's shortest one.

    `None` where that would leave the stage without layers.
    """
    stages = range(len(cut.layers))
    longest = max(stages[giving::pipeline_size], key=lambda stage: cut.layers[stage])
    shortest = min(stages[taking::pipeline_size], key=lambda stage: cut.layers[stage])
    if cut.layers[longest] < 2:
        return None
    change = {longest: -1, shortest: 1}
    return replace(cut, layers=tuple(cut.layers[s] + change.get(s, 0) for s in stages))
