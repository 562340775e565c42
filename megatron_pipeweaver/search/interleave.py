"""Stage interleaving: priorities in, a schedule out (paper section 4.2), in the native core.

Every rank keeps what is ready: forwards, backwards and weight gradients. The rank that can start
something first does so; of what it could start at that moment, the least key goes first, or, with
`alternate`, forwards and backwards take turns (the paper's dual queue, 1F1B). Memory is held from
the start of a forward to the end of the backward, or of its weight gradient where it is split off.

**Admission cannot deadlock.** The paper disables a rank's forward queue when its memory is full;
with microbatches of different sizes that can stop all ranks for good. Here a forward starts only
if the state after it is *safe*. Let the microbatches in flight be m1, m2, ... in the order in
which they started: one order, the same on all ranks. For a rank r let held_r(m) be what m holds
and need_r(m) the most that m, running alone, could come to hold beyond that, at its leanest
strategies. The state is safe when, on every rank r and for every i,

    sum(held_r(mj) for j >= i) + need_r(mi) <= capacity_r.

*Safe means that all can finish*: m1 alone, everyone else standing still, has need_r(m1) free on
every rank, so it can run to its end at its leanest strategies and gives its memory back; then the
condition for m2 says the same of m2, and so on; a microbatch that has not started then finds the
ranks empty, and it fits alone. *Every step keeps the state safe*: backwards and weight gradients
only give memory back (what a microbatch that runs its passes in one fixed order gives back is
added to its need, so the sum does not grow), starting a microbatch puts it last, where it
only has to fit alone, and forwards are checked. The forward of a frozen pass holds memory only
while it runs, so it needs no more than room on its rank. *Somebody can always go on*: when no
backward and no weight gradient is ready, all that waits is forwards. Take m1: it is not done, so
something of it is ready, which is a forward; at its leanest strategy it keeps the state safe,
because need_r(m1) already counts it. Forwards that are bound to a faster strategy may all be
refused; then m1 is *relaxed*, which lets it use leaner ones. So the decode never stops early, and
a schedule exists whenever each microbatch alone fits at its leanest strategies. The limit on load
in flight keeps only new microbatches out, and in deterministic mode microbatches start in their
order, so m1 never waits for a backward of one that has not started.

*Alone*: if all stages of a microbatch fit at once, so does any order of its passes. Otherwise its
forwards' orders are searched: backwards run as soon as they may (they only give memory back), so
what is held depends on the set of passes run forward and on nothing else, and interleaving the
stages of two passes holds at least as much as running one after the other. If no order fits, no
schedule exists, and `InfeasibleError` names the rank and the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pipeweaver._core import Policy
from megatron_pipeweaver.ir.problem import Problem

CLASS = 1 << 40
"""Distance between the key classes: any key of a lower class goes before all of a higher one."""
NEVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Which class goes first where several ops could start: the lower number.

    `enter` is the first forward of a pass without producers, `forward` any other.
    """

    backward: int = 1
    forward: int = 2
    enter: int = 4
    weight: int = 3


def policy(
    problem: Problem,
    levels: list[int],
    *,
    keys: Keys | None = None,
    split: bool = True,
    in_order: bool = False,
    alternate: bool = False,
) -> Policy:
    """A policy that runs microbatches in their order, oldest first, by class.

    Args:
        problem: what is to be scheduled.
        levels: per stage pair, the fastest level it may use.
        keys: which class of op goes first.
        split: weight gradients are ops of their own.
        in_order: each stage's backwards keep the order of microbatches.
        alternate: forwards and backwards by turns.
    """
    made = Policy()
    made.key = class_keys(problem, [keys or Keys()] * problem_passes(problem))
    made.level = levels
    made.load = [1] * len(problem.microbatches)
    made.release = [0] * len(problem.microbatches)
    made.load_limit = NEVER
    made.split = split
    made.in_order = in_order
    made.alternate = alternate
    return made


def problem_passes(problem: Problem) -> int:
    """How many passes `problem` has."""
    return sum(len(one.passes) for one in problem.microbatches)


def class_keys(problem: Problem, keys: Sequence[Keys]) -> list[int]:
    """The key of every op (3 per stage pair: forward, backward, weight gradient).

    Args:
        problem: what is to be scheduled.
        keys: the classes of each pass's ops; within a class the pass that stands first in the
            problem goes first.
    """
    made: list[int] = []
    for index, ((_, one), classes) in enumerate(zip(problem.passes(), keys, strict=True)):
        backward = classes.backward * CLASS + index
        weight = classes.weight * CLASS + index
        forward = classes.forward * CLASS + index
        first = forward if one.after else classes.enter * CLASS + index
        made += [first, backward, weight]
        made += [forward, backward, weight] * (len(one.stages) - 1)
    return made
