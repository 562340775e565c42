"""1F1B over the best contiguous cut: the whole model as one chain, a part of it on each rank.

Where a stage runs is given by a `Problem`, so this cut is another problem and its schedule cannot
start the search; `pipeweaver compare` tables it beside the schedules of the problem itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from graphlib import TopologicalSorter

from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy

MODULE = "model"
Place = tuple[str, int]
"""A module's stage: its place in the chain."""
Part = tuple[Place, Fraction]
"""What share of a stage is in a part of the chain."""


def contiguous(problem: Problem) -> Problem:
    """`problem`'s work on the contiguous cut that spreads its mean microbatch evenly.

    All modules' stages stand in one chain, encoders first, and rank r gets the r-th of P parts of
    equal time (mean over the microbatches, fastest strategies). A stage holds layers, so it is cut
    where the sum says so, in fractions, which is kinder than whole layers would be. A microbatch is
    one pass: its sub-microbatches go together, and memory of frozen passes, which nothing holds, is
    left out. A pass's strategies are what all stages do at one level, from the leanest to the
    fastest. A message takes as long as the longest of the microbatch's.

    1F1B of D. Narayanan et al. (ICML 2021) on this is `baselines.schedule(..., "one_f_one_b")`,
    with ranks of equal capacity as `problem` says.
    """
    chain = [
        (module, stage)
        for module in _modules_in_order(problem)
        for stage in range(problem.pipeline_size * problem.modules[module])
    ]
    work = [_work(one) for one in problem.microbatches]
    levels = max((len(one.levels) for each in work for one in each.values()), default=1)
    weights = [
        sum(each[place].levels[-1].time_ns for each in work if place in each) for place in chain
    ]
    parts = _cut(chain, weights, problem.pipeline_size)
    return Problem(
        pipeline_size=problem.pipeline_size,
        memory_capacity_bytes=problem.memory_capacity_bytes,
        modules={MODULE: 1},
        microbatches=tuple(
            Microbatch(
                passes=(
                    Pass(
                        module=MODULE,
                        sub_microbatch=0,
                        p2p_latency_ns=max((p.p2p_latency_ns for p in one.passes), default=0),
                        stages=tuple(_strategies(part, each, levels) for part in parts),
                    ),
                )
            )
            for one, each in zip(problem.microbatches, work, strict=True)
        ),
    )


def _modules_in_order(problem: Problem) -> list[str]:
    """Every module behind those that feed it; otherwise as the problem has them."""
    before: dict[str, set[str]] = {name: set() for name in problem.modules}
    for one in problem.microbatches:
        for each in one.passes:
            before[each.module].update(name for name, _ in each.after if name != each.module)
    return list(TopologicalSorter(before).static_order())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """Times (ns) and memory (bytes) of one level."""

    forward_ns: int = 0
    backward_ns: int = 0
    weight_grad_ns: int = 0
    memory_bytes: int = 0

    @property
    def time_ns(self) -> int:
        return self.forward_ns + self.backward_ns + self.weight_grad_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A stage of one microbatch, its sub-microbatches together: costs from lean to fast."""

    levels: tuple[_Cost, ...]

    def at(self, share: Fraction) -> _Cost:
        """The level at `share` of the way from the leanest (0) to the fastest (1)."""
        return self.levels[round(share * (len(self.levels) - 1))]


def _work(microbatch: Microbatch) -> Mapping[Place, _Stage]:
    total: dict[Place, _Stage] = {}
    for one in microbatch.passes:
        for stage, strategies in enumerate(one.stages):
            place = one.module, stage
            mine = _Stage(levels=_levels(strategies, frozen=one.frozen))
            total[place] = _together(total[place], mine) if place in total else mine
    return total


def _levels(strategies: Sequence[Strategy], *, frozen: bool) -> tuple[_Cost, ...]:
    """Costs from the leanest to the fastest; those that another one beats are left out."""
    levels: list[_Cost] = []
    for one in sorted(strategies, key=lambda s: (s.memory_bytes, _time_ns(s, frozen=frozen))):
        if levels and _time_ns(one, frozen=frozen) >= levels[-1].time_ns:
            continue
        levels.append(
            _Cost(forward_ns=one.forward_ns)
            if frozen
            else _Cost(
                forward_ns=one.forward_ns,
                backward_ns=one.backward_ns,
                weight_grad_ns=one.weight_grad_ns,
                memory_bytes=one.memory_bytes,
            )
        )
    return tuple(levels)


def _time_ns(one: Strategy, *, frozen: bool) -> int:
    return one.forward_ns + (0 if frozen else one.backward_ns + one.weight_grad_ns)


def _together(one: _Stage, other: _Stage) -> _Stage:
    count = max(len(one.levels), len(other.levels))
    shares = [Fraction(level, max(1, count - 1)) for level in range(count)]
    return _Stage(levels=tuple(_sum([(one.at(s), _ONE), (other.at(s), _ONE)]) for s in shares))


_ONE = Fraction(1)


def _sum(costs: Sequence[tuple[_Cost, Fraction]]) -> _Cost:
    return _Cost(
        forward_ns=round(sum(share * one.forward_ns for one, share in costs)),
        backward_ns=round(sum(share * one.backward_ns for one, share in costs)),
        weight_grad_ns=round(sum(share * one.weight_grad_ns for one, share in costs)),
        memory_bytes=round(sum(share * one.memory_bytes for one, share in costs)),
    )


def _cut(chain: Sequence[Place], weights: Sequence[int], parts: int) -> list[list[Part]]:
    """The chain in `parts` of equal weight, each a list of stages and the share of them in it."""
    total = sum(weights)
    made: list[list[Part]] = [[] for _ in range(parts)]
    begin = 0
    for place, weight in zip(chain, weights, strict=True):
        if not weight:
            made[min(parts - 1, begin * parts // max(1, total))].append((place, _ONE))
        for index in range(parts):
            lower, upper = Fraction(index * total, parts), Fraction((index + 1) * total, parts)
            share = min(upper, Fraction(begin + weight)) - max(lower, Fraction(begin))
            if share > 0:
                made[index].append((place, share / weight))
        begin += weight
    return made


def _strategies(
    part: Sequence[Part], work: Mapping[Place, _Stage], levels: int
) -> tuple[Strategy, ...]:
    made = []
    for level in range(levels):
        at = Fraction(level, max(1, levels - 1))
        cost = _sum([(work[place].at(at), share) for place, share in part if place in work])
        made.append(
            Strategy(
                name=f"level_{level}",
                forward_ns=cost.forward_ns,
                backward_ns=cost.backward_ns,
                weight_grad_ns=cost.weight_grad_ns,
                memory_bytes=cost.memory_bytes,
            )
        )
    return tuple(made)
