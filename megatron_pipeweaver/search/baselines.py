"""The static schedules that PipeWeaver competes with, re-implemented from their descriptions.

Each gives a complete, memory-feasible schedule of the same problem: the same stages on the same
ranks, with its own fixed order. All use one recompute level for the whole batch, the fastest one
at which their order has the best makespan, since that is how the systems are run.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_pipeweaver._core import Policy, Timetable
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.interleave import Keys, class_keys, policy
from megatron_pipeweaver.search.native import NativeProblem

LevelPolicy = Callable[[Problem, list[int]], Policy]


def interleaved_1f1b_policy(problem: Problem, levels: list[int]) -> Policy:
    """Forwards and backwards by turns, microbatches in order (re-implemented).

    Interleaved 1F1B of D. Narayanan et al., "Efficient large-scale language model training on GPU
    clusters using Megatron-LM" (SC 2021), section 2.2: every rank holds several model chunks and
    alternates one forward with one backward once backwards arrive. Encoders are chunks like others.
    """
    return policy(problem, levels, keys=Keys(enter=2), split=False, alternate=True)


def encoders_first_policy(problem: Problem, levels: list[int]) -> Policy:
    """All encoder forwards before the backbone, which runs interleaved 1F1B (re-implemented).

    Coarse form of Optimus (W. Feng et al., "Optimus: Accelerating large-scale multi-modal LLM
    training by bubble exploitation", USENIX ATC 2025): encoder forwards of all microbatches come
    before the backbone's forwards, encoder backwards after its backwards.
    """
    made = policy(problem, levels, split=False, alternate=True)
    feeds = {
        (index, *name)
        for index, microbatch in enumerate(problem.microbatches)
        for one in microbatch.passes
        for name in one.after
    }
    encoder, other = Keys(backward=3, forward=1, enter=1), Keys(backward=2, forward=2, enter=2)
    made.key = class_keys(
        problem, [encoder if tuple(key) in feeds else other for key, _ in problem.passes()]
    )
    return made


BASELINES: dict[str, LevelPolicy] = {
    "interleaved_1f1b": interleaved_1f1b_policy,
    "encoders_first": encoders_first_policy,
}


def best_level(native: NativeProblem, build: LevelPolicy) -> Timetable:
    """The best of `build`'s decodes over one recompute level for the whole batch."""
    counts = native.level_counts()
    best: Timetable | None = None
    for level in range(max(counts, default=1)):
        levels = [round(level / max(1, max(counts) - 1) * (count - 1)) for count in counts]
        made = build(native.problem, levels)
        made.in_order = native.in_order
        table = native.core.decode(made)
        if best is None or table.makespan < best.makespan:
            best = table
    assert best is not None
    return best


def interleaved_1f1b(problem: Problem, *, in_order: bool = False) -> Schedule:
    """The interleaved 1F1B schedule of `problem`; see `interleaved_1f1b_policy`."""
    return _schedule(problem, "interleaved_1f1b", in_order)


def encoders_first(problem: Problem, *, in_order: bool = False) -> Schedule:
    """The encoders-first schedule of `problem`; see `encoders_first_policy`."""
    return _schedule(problem, "encoders_first", in_order)


def _schedule(problem: Problem, name: str, in_order: bool) -> Schedule:
    native = NativeProblem(problem, in_order=in_order)
    return native.schedule(
        best_level(native, BASELINES[name]),
        split=False,
        lower_bound_ns=max(lower_bounds(native.core).values()),
        problem_sha256="",
    )
