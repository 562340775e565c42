"""Proven lower bounds of the makespan, computed in the native core.

All bounds let every part of every stage pair (forward, input gradient, weight gradient) take the
least time that any of its strategies gives it, on its own, and let weight gradients be split off.
Any valid schedule, split or not, gives a valid schedule of that easier problem that ends no later:
cut each unsplit backward in two and shorten every op in place. So a bound of the easier problem
bounds the problem.

- **critical path**: ops on a chain of dependencies run one after another with their latencies
  between them, so no schedule is shorter than the longest chain.
- **jackson** of a rank: take the ops of one rank as jobs. An op's *head* is the longest chain of
  dependencies that has to end before it starts, its *tail* the longest chain that can only start
  after it ends. In any schedule an op starts no earlier than its head, and the schedule ends no
  earlier than the op's end plus its tail; the rank runs one op at a time. Dropping all other
  dependencies and letting ops be interrupted leaves the one-machine problem with heads and tails,
  which Jackson's rule (always run the ready job with the longest tail) solves exactly when jobs may
  be interrupted (J. R. Jackson 1955; J. Carlier, "The one-machine sequencing problem", EJOR 11,
  1982). Its optimum is a lower bound for each rank, and so is the largest of them.
- **time_memory** of a rank: a stage pair that uses strategy s holds its memory at least from the
  start of its forward to the end of its backward and weight gradient, and between the two lie at
  least the forwards and backwards of the later stages of its pass and, behind its last stage, of
  the passes that consume it (whose backward it waits for). Memory times that residence, summed over
  the rank's stage pairs, is at most capacity times makespan. So for a makespan T the rank's work is
  at least the least sum of times over choices of strategies whose areas sum to capacity x T or
  less; letting strategies be mixed in fractions only lowers it, and then taking the steps of each
  pair's lower convex hull in the order of time saved per area is optimal (the linear
  multiple-choice knapsack; E. Zemel, 1980). The rank can work only between the least head and the
  least tail of its ops. T is ruled out while work, head and tail do not fit into T, and that holds
  for an interval from 0 up, because all three shrink or stay as T grows.
"""

from __future__ import annotations

from megatron_pipeweaver._core import Core


def lower_bounds(core: Core) -> dict[str, int]:
    """Every bound by name, in nanoseconds; those of ranks are the largest rank's."""
    bounds = core.bounds()
    return {
        "critical_path": bounds.critical_path,
        "jackson": max(bounds.jackson, default=0),
        "time_memory": max(bounds.time_memory, default=0),
    }
