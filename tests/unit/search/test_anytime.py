"""The front door: determinism, deadlines, improvement reports, every way to explore."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest

from megatron_pipeweaver._core import SearchOutcome, Stop
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import Exploration, SearchConfig
from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.problem import Microbatch, OpKind, Pass, Problem, Strategy
from megatron_pipeweaver.search.anytime import Improvement, search_options, solve
from megatron_pipeweaver.search.interleave import policy
from megatron_pipeweaver.search.native import NativeProblem


def strategies(scale: int) -> tuple[Strategy, ...]:
    return (
        Strategy(
            name="keep", forward_ns=10 * scale, backward_ns=11 * scale,
            weight_grad_ns=9 * scale, memory_bytes=100 * scale,
        ),
        Strategy(
            name="recompute", forward_ns=10 * scale, backward_ns=21 * scale,
            weight_grad_ns=9 * scale, memory_bytes=5 * scale,
        ),
    )  # fmt: skip


def example(microbatches: int = 8, capacity: int = 900, ranks: int = 3) -> Problem:
    made = []
    for index in range(microbatches):
        images = index % 3
        vision = [
            Pass(module="vision", sub_microbatch=sub, p2p_latency_ns=2,
                 stages=(strategies(1 + index % 2),) * ranks)
            for sub in range(images)
        ]  # fmt: skip
        language = Pass(
            module="language", sub_microbatch=0, p2p_latency_ns=1,
            after=tuple(("vision", sub) for sub in range(images)),
            stages=(strategies(2),) * ranks,
        )  # fmt: skip
        made.append(Microbatch(passes=(*vision, language)))
    return Problem(
        pipeline_size=ranks,
        memory_capacity_bytes=(capacity,) * ranks,
        modules={"vision": 1, "language": 1},
        microbatches=tuple(made),
    )


@pytest.mark.parametrize("exploration", list(Exploration))
@pytest.mark.parametrize("choose_memory", [True, False])
def test_every_exploration_gives_a_valid_schedule(
    exploration: Exploration, choose_memory: bool
) -> None:
    problem = example()
    config = SearchConfig(
        max_rounds=60, exploration=exploration, choose_memory=choose_memory, threads=2
    )
    result = solve(problem, config)
    check_schedule(problem, result.schedule)
    assert result.schedule.makespan_ns <= min(result.baselines.values())


def explored(problem: Problem, config: SearchConfig) -> SearchOutcome:
    """What exploration alone makes of a start that runs one microbatch after another."""
    native = NativeProblem(problem, in_order=False)
    one_after_another = policy(problem, [0] * len(native.level_counts()))
    one_after_another.load_limit = 0
    start = native.core.decode(one_after_another)
    options = search_options(config)
    options.budget_ns = config.time_budget_ns
    outcome = native.core.search(options, start, lambda *_: None)
    assert outcome.best.makespan <= start.makespan
    check_schedule(problem, native.schedule(outcome.best, lower_bound_ns=0, problem_sha256=""))
    return outcome


def test_the_turns_of_the_dual_queue_can_be_switched_off() -> None:
    config = SearchConfig(max_rounds=12, time_budget_ns=10**12, exploration=Exploration.MCTS)
    whole = explored(example(), config)
    assert explored(example(), replace(config, alternate=False)).best.order != whole.best.order


def test_segments_can_have_priorities_of_their_own() -> None:
    # Two images and a text: forwards and backwards of two modules, or of three passes.
    problem = example(microbatches=3)
    problem = replace(problem, microbatches=problem.microbatches[2:])
    config = SearchConfig(
        time_budget_ns=10**12, exploration=Exploration.DFS, choose_memory=False, seed=1
    )
    assert explored(problem, config).evaluations == math.factorial(4)
    assert explored(problem, replace(config, group_segments=False)).evaluations == math.factorial(6)


def test_one_thread_and_a_number_of_rounds_give_the_same_schedule_every_time() -> None:
    problem = example()
    config = SearchConfig(max_rounds=120, seed=7, time_budget_ns=10**12)
    assert solve(problem, config).schedule == solve(problem, config).schedule


def test_one_thread_of_the_reported_seed_finds_what_several_threads_found() -> None:
    problem = example()
    for seed in range(4):
        config = SearchConfig(max_rounds=150, seed=seed, threads=3, time_budget_ns=10**12)
        result = solve(problem, config)
        again = solve(problem, replace(config, seed=result.seed, threads=1))
        assert again.schedule == result.schedule
        assert (again.thread, again.rounds) == (0, result.rounds)
        assert result.seed == seed + result.thread


def test_search_beats_every_static_schedule_when_there_is_room() -> None:
    result = solve(example(), SearchConfig(max_rounds=400, time_budget_ns=10**12))
    assert result.schedule.makespan_ns < min(result.baselines.values())


def test_improvements_only_ever_improve_and_end_at_the_result() -> None:
    seen: list[Improvement] = []
    result = solve(example(), SearchConfig(max_rounds=100, threads=2), on_improvement=seen.append)
    makespans = [one.makespan_ns for one in seen]
    assert makespans == sorted(makespans, reverse=True)
    assert len(set(makespans)) == len(makespans)
    assert makespans[-1] == result.schedule.makespan_ns


def test_no_time_at_all_still_gives_a_schedule() -> None:
    problem = example()
    result = solve(problem, SearchConfig(time_budget_ns=0))
    check_schedule(problem, result.schedule)


@pytest.mark.parametrize("exploration", list(Exploration))
def test_a_search_that_is_stopped_ends_with_the_best_so_far(exploration: Exploration) -> None:
    problem, stop = example(), Stop()
    config = SearchConfig(time_budget_ns=600 * 10**9, threads=2, exploration=exploration)
    threading.Timer(0.05, stop.request).start()
    result = solve(problem, config, stop=stop)
    check_schedule(problem, result.schedule)
    assert result.elapsed_ns < config.time_budget_ns
    assert result.evaluations > 1


def test_a_search_that_is_stopped_before_it_begins_still_has_a_schedule() -> None:
    problem, stop = example(), Stop()
    stop.request()
    result = solve(problem, SearchConfig(time_budget_ns=600 * 10**9), stop=stop)
    check_schedule(problem, result.schedule)
    assert result.schedule.makespan_ns <= min(result.baselines.values())


def test_weight_gradients_stay_in_the_backward_when_not_split() -> None:
    config = SearchConfig(max_rounds=50, split_weight_grad=False)
    schedule = solve(example(), config).schedule
    assert all(op.kind is not OpKind.W for rank in schedule.ranks for op in rank)


def test_infeasible_names_microbatch_rank_and_bytes() -> None:
    with pytest.raises(InfeasibleError, match=r"microbatch 1, rank 0: alone .* 20 bytes"):
        solve(example(capacity=19), SearchConfig(max_rounds=1))


def test_the_empty_problem_has_an_empty_schedule() -> None:
    problem = example(microbatches=0)
    result = solve(problem, SearchConfig(max_rounds=10))
    check_schedule(problem, result.schedule)
    assert result.schedule.makespan_ns == 0


def test_encoders_that_must_not_enter_first_do_not_block_the_decoder() -> None:
    """A microbatch that fits in one order of its passes only, under a baseline with another."""

    def stage(bytes_: int) -> tuple[Strategy, ...]:
        return (
            Strategy(name="s", forward_ns=1, backward_ns=1, weight_grad_ns=1, memory_bytes=bytes_),
        )

    problem = Problem(
        pipeline_size=1,
        memory_capacity_bytes=(1,),
        modules={"e": 2, "d": 1},
        microbatches=(
            Microbatch(
                passes=(
                    Pass(module="e", sub_microbatch=0, stages=(stage(0), stage(0))),
                    Pass(module="e", sub_microbatch=1, stages=(stage(0), stage(0))),
                    Pass(module="d", sub_microbatch=0, after=(("e", 1),), stages=(stage(1),)),
                    Pass(module="d", sub_microbatch=1, after=(("e", 1),), stages=(stage(1),)),
                )
            ),
        ),
    )
    check_schedule(problem, solve(problem, SearchConfig(max_rounds=20)).schedule)
