"""The static schedules that PipeWeaver competes with, re-implemented from their descriptions.

Each gives a complete, memory-feasible schedule of the same problem: the same stages on the same
ranks, with its own fixed rule of order. All but `zero_bubble` keep the backward whole. All use one
recompute level for the whole batch, the one at which their rule has the best makespan, since that
is how the systems are run; a forward that does not fit at that level takes a leaner one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_pipeweaver._core import Policy, Timetable
from megatron_pipeweaver.ir.problem import PassKey, Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.interleave import Keys, class_keys, policy
from megatron_pipeweaver.search.native import NativeProblem

LevelPolicy = Callable[[Problem, list[int]], Policy]


def encoder_passes(problem: Problem) -> set[PassKey]:
    """The passes whose output another pass consumes, directly."""
    return {producer for node in problem.graph.nodes.values() for producer in node.after}


def interleaved_1f1b_policy(problem: Problem, levels: list[int]) -> Policy:
    """Forwards and backwards by turns, microbatches in order (re-implemented).

    Interleaved 1F1B of D. Narayanan et al., "Efficient large-scale language model training on GPU
    clusters using Megatron-LM" (SC 2021), section 2.2: every rank holds several model chunks and
    alternates one forward with one backward once backwards arrive. Encoders are chunks like others.
    """
    return policy(problem, levels, keys=Keys(enter=2), split=False, alternate=True)


def one_f_one_b_policy(problem: Problem, levels: list[int]) -> Policy:
    """At most one microbatch in flight per rank and chunk of the longest module chain.

    1F1B of D. Narayanan et al., "Memory-efficient pipeline-parallel DNN training" (ICML 2021,
    PipeDream-Flush): at most as many microbatches in flight as the pipeline is deep, forwards and
    backwards by turns. Where chunks run is given by the problem; on the best contiguous split of
    all chunks it is this rule on another problem, that of `contiguous.contiguous`.
    """
    made = interleaved_1f1b_policy(problem, levels)
    depth = max(
        (len(one.passes[-1].stages) for one in problem.microbatches if one.passes), default=1
    )
    made.load_limit = max(problem.pipeline_size, depth)
    return made


def encoders_first_policy(problem: Problem, levels: list[int]) -> Policy:
    """All encoder forwards before the backbone, which runs interleaved 1F1B (re-implemented).

    Coarse form of Optimus (W. Feng et al., "Optimus: Accelerating large-scale multi-modal LLM
    training by bubble exploitation", USENIX ATC 2025): encoder forwards of all microbatches come
    before the backbone's forwards, encoder backwards after its backwards.
    """
    made = policy(problem, levels, split=False, alternate=True)
    encoder, other = Keys(backward=3, forward=1, enter=1), Keys(backward=2, forward=2, enter=2)
    feeds = encoder_passes(problem)
    made.key = class_keys(
        problem, [encoder if key in feeds else other for key, _ in problem.passes()]
    )
    return made


def nnscaler_like_policy(problem: Problem, levels: list[int]) -> Policy:
    """A plan for a representative batch, run as it stands on this one (re-implemented).

    After Z. Lin et al., "nnScaler: Constraint-guided parallelization plan generation for deep
    learning training" (OSDI 2024), with the 1F1B planner: the plan is made once, for microbatches
    that are all alike, so its order and its number of microbatches in flight (ranks times segments)
    do not depend on what this batch's microbatches hold; forwards and backwards by turns.
    """
    made = policy(problem, levels, keys=Keys(enter=3), split=False, alternate=True)
    made.load_limit = _chain(problem)
    return made


def bigmac_like_policy(problem: Problem, levels: list[int]) -> Policy:
    """Encoders nested in the backbone's pipeline (re-implemented).

    After BigMac (2025): a microbatch's encoder forward runs right before its backbone forward and
    its encoder backward right after its backbone backward, so that few encoder activations are
    alive: the oldest microbatch first, whatever the op, and a new one only when nothing else can
    run and no more are in flight than the chain of all chunks is long.
    """
    made = policy(problem, levels, keys=Keys(backward=1, forward=1, enter=2), split=False)
    made.load_limit = _chain(problem)
    return made


def _chain(problem: Problem) -> int:
    """How many stages a microbatch goes through that uses every module once."""
    return problem.pipeline_size * max(1, sum(problem.modules.values()))


def zero_bubble_like_policy(problem: Problem, levels: list[int]) -> Policy:
    """Weight gradients split off and run where a rank would idle (re-implemented).

    After P. Qi et al., "Zero bubble pipeline parallelism" (ICLR 2024): the order of 1F1B, input
    gradients at once, weight gradients when nothing else can run or memory is short.
    """
    return policy(problem, levels, keys=Keys(enter=2, weight=5), split=True, alternate=True)


BASELINES: Mapping[str, LevelPolicy] = {
    "one_f_one_b": one_f_one_b_policy,
    "interleaved_1f1b": interleaved_1f1b_policy,
    "encoders_first": encoders_first_policy,
    "nnscaler_like": nnscaler_like_policy,
    "bigmac_like": bigmac_like_policy,
    "zero_bubble_like": zero_bubble_like_policy,
}


def best_level(native: NativeProblem, build: LevelPolicy, *, split: bool = True) -> Timetable:
    """The best of `build`'s decodes over one recompute level for the whole batch.

    Args:
        native: what is to be scheduled.
        build: one of `BASELINES`.
        split: weight gradients may be ops of their own, where the baseline wants that.
    """
    counts = native.level_counts()
    most = max(counts, default=1)
    best: Timetable | None = None
    for level in range(most):
        levels = [round(level / max(1, most - 1) * (count - 1)) for count in counts]
        made = build(native.problem, levels)
        made.in_order = native.in_order
        made.split = made.split and split
        table = native.core.decode(made)
        if best is None or table.makespan < best.makespan:
            best = table
    assert best is not None
    return best


def schedule(problem: Problem, name: str, *, in_order: bool = False) -> Schedule:
    """The schedule of baseline `name` (one of `BASELINES`) for `problem`.

    Raises:
        InfeasibleError: one microbatch alone, at its leanest strategies, does not fit.
    """
    native = NativeProblem(problem, in_order=in_order)
    return native.schedule(
        best_level(native, BASELINES[name]),
        lower_bound_ns=max(lower_bounds(native.core).values()),
        problem_sha256="",
    )


def interleaved_1f1b(problem: Problem, **options: Any) -> Schedule:
    """The interleaved 1F1B schedule of `problem`; see `interleaved_1f1b_policy`."""
    return schedule(problem, "interleaved_1f1b", **options)


def encoders_first(problem: Problem, **options: Any) -> Schedule:
    """The encoders-first schedule of `problem`; see `encoders_first_policy`."""
    return schedule(problem, "encoders_first", **options)
