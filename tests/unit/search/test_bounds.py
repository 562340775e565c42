"""Bounds by hand, and never above what brute force finds."""

from __future__ import annotations

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.native import NativeProblem


def chain(ranks: int, microbatches: int) -> Problem:
    stage = (Strategy(name="s", forward_ns=2, backward_ns=3, weight_grad_ns=1, memory_bytes=1),)
    one = Pass(module="m", sub_microbatch=0, p2p_latency_ns=5, stages=(stage,) * ranks)
    return Problem(
        pipeline_size=ranks,
        memory_capacity_bytes=(microbatches,) * ranks,
        modules={"m": 1},
        microbatches=(Microbatch(passes=(one,)),) * microbatches,
    )


def test_critical_path_of_one_microbatch() -> None:
    # F F F, B B B, and the weight gradient at the end; two hops each way.
    bounds = lower_bounds(NativeProblem(chain(3, 1)).core)
    assert bounds["critical_path"] == 3 * 2 + 3 * 3 + 1 + 4 * 5


def test_jackson_counts_all_work_and_the_way_to_the_rank_and_back() -> None:
    # Last rank: reached after 2 x (2 + 5); its last backward has 2 x (5 + 3) + 1 behind it, and
    # what must run there before it is all but one weight gradient at the least.
    bounds = lower_bounds(NativeProblem(chain(3, 8)).core)
    assert bounds["jackson"] >= 14 + 8 * (2 + 3)
    assert bounds["jackson"] >= 8 * 6


def test_one_rank_is_solved_to_its_bound() -> None:
    problem = chain(1, 4)
    result = solve(problem, SearchConfig(max_rounds=5))
    assert result.schedule.makespan_ns == max(result.bounds.values()) == 4 * 6


def test_a_strategy_that_is_no_level_still_counts_for_the_bound() -> None:
    """Its forward is short though it loses in time and memory together: some schedule uses it."""
    lean = Strategy(name="a", forward_ns=10, backward_ns=1, weight_grad_ns=0, memory_bytes=1)
    odd = Strategy(name="b", forward_ns=1, backward_ns=20, weight_grad_ns=0, memory_bytes=2)
    one = Pass(module="m", sub_microbatch=0, stages=((lean, odd),))
    problem = Problem(
        pipeline_size=1,
        memory_capacity_bytes=(9,),
        modules={"m": 1},
        microbatches=(Microbatch(passes=(one,)),),
    )
    assert lower_bounds(NativeProblem(problem).core)["critical_path"] == 1 + 1
