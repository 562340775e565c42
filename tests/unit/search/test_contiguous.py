"""The contiguous cut: all work is there once, parts are equal, and 1F1B takes what it must."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from megatron_pipeweaver.search.baselines import schedule
from megatron_pipeweaver.search.contiguous import _cut, contiguous


def costs(scale: int) -> tuple[Strategy, ...]:
    keep = Strategy(
        name="keep", forward_ns=scale, backward_ns=scale, weight_grad_ns=2 * scale,
        memory_bytes=10 * scale,
    )  # fmt: skip
    lean = Strategy(
        name="recompute", forward_ns=scale, backward_ns=2 * scale, weight_grad_ns=2 * scale,
        memory_bytes=scale,
    )  # fmt: skip
    return keep, lean


def job(images: list[int], *, frozen: bool = False, capacity: int = 10**6) -> Problem:
    """Two ranks; a vision stage takes a third of a language stage, and images come one by one."""
    made = []
    for count in images:
        vision = [
            Pass(module="vision", sub_microbatch=i, p2p_latency_ns=0, stages=(costs(60),) * 2,
                 frozen=frozen)
            for i in range(count)
        ]  # fmt: skip
        language = Pass(
            module="language", sub_microbatch=0, after=tuple(("vision", i) for i in range(count)),
            stages=(costs(180),) * 2,
        )  # fmt: skip
        made.append(Microbatch(passes=(*vision, language)))
    return Problem(
        pipeline_size=2,
        memory_capacity_bytes=(capacity, capacity),
        modules={"language": 1, "vision": 1},
        microbatches=tuple(made),
    )


def test_a_stage_is_cut_where_the_sum_says() -> None:
    chain = [("vision", 0), ("vision", 1), ("language", 0), ("language", 1)]
    assert _cut(chain, [60, 60, 180, 180], 2) == [
        [
            (("vision", 0), Fraction(1)),
            (("vision", 1), Fraction(1)),
            (("language", 0), Fraction(2, 3)),
        ],
        [(("language", 0), Fraction(1, 3)), (("language", 1), Fraction(1))],
    ]
    assert _cut(chain[:2], [0, 7], 2) == [
        [(("vision", 0), Fraction(1)), (("vision", 1), Fraction(1, 2))],
        [(("vision", 1), Fraction(1, 2))],
    ]


def test_alike_microbatches_take_what_1f1b_takes() -> None:
    recut = contiguous(job([1] * 6))
    fast = [stage[-1] for stage in recut.microbatches[0].passes[0].stages]
    assert [(one.forward_ns, one.backward_ns, one.weight_grad_ns) for one in fast] == [
        (240, 240, 480)
    ] * 2
    made = schedule(recut, "one_f_one_b")
    check_schedule(recut, made)
    assert made.makespan_ns == (6 + 2 - 1) * (240 + 240 + 480)


@pytest.mark.parametrize("images", [[0, 3, 1], [2, 2], [0, 0]])
@pytest.mark.parametrize("level", [0, 1])
def test_all_work_is_there_once(images: list[int], level: int) -> None:
    problem = job(images)
    for before, after in zip(problem.microbatches, contiguous(problem).microbatches, strict=True):
        (one,) = after.passes
        made = [stage[level] for stage in one.stages]
        asked = [stage[1 - level] for each in before.passes for stage in each.stages]
        for what in ("forward_ns", "backward_ns", "weight_grad_ns", "memory_bytes"):
            total = sum(getattr(s, what) for s in asked)
            assert abs(sum(getattr(s, what) for s in made) - total) <= len(made)


def test_a_frozen_encoder_has_no_backward_and_holds_nothing() -> None:
    problem = job([1], frozen=True)
    stages = [stage[-1] for stage in contiguous(problem).microbatches[0].passes[0].stages]
    assert sum(one.forward_ns for one in stages) == 2 * 60 + 2 * 180
    assert sum(one.backward_ns for one in stages) == 2 * 180
    assert sum(one.memory_bytes for one in stages) == 2 * 1800


def test_short_memory_takes_a_leaner_level() -> None:
    loose = schedule(contiguous(job([1] * 6)), "one_f_one_b")
    tight = schedule(contiguous(job([1] * 6, capacity=3000)), "one_f_one_b")
    assert max(tight.peak_memory_bytes) <= 3000 < max(loose.peak_memory_bytes)
    assert tight.makespan_ns > loose.makespan_ns
