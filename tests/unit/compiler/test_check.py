"""check_schedule: the valid passes, and every broken rule is told by rank, op and fault."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.errors import PlanInvalidError
from megatron_pipeweaver.ir.problem import Microbatch, OpKind, Pass, Problem, Strategy
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.ir.timeline import memory_peaks, memory_timeline
from tests.unit.compiler.samples import draw_sample

KEEP = Strategy(name="keep", forward_ns=10, backward_ns=10, weight_grad_ns=5, memory_bytes=8)
LEAN = Strategy(name="lean", forward_ns=10, backward_ns=20, weight_grad_ns=5, memory_bytes=2)


def _problem(**changes: object) -> Problem:
    def one(module: str, after: tuple[tuple[str, int], ...], frozen: bool) -> Pass:
        return Pass(
            module=module,
            sub_microbatch=0,
            after=after,
            p2p_latency_ns=3,
            stages=((KEEP, LEAN),) * 2,
            frozen=frozen,
        )

    first = Microbatch(passes=(one("v", (), True), one("lm", (("v", 0),), False)))
    base = Problem(
        pipeline_size=2,
        memory_capacity_bytes=(16, 16),
        modules={"v": 1, "lm": 1},
        microbatches=(first,),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _op(text: str, start: int, end: int, strategy: str = "keep") -> ScheduledOp:
    return ScheduledOp(key=parse_op(text), strategy=strategy, start_ns=start, end_ns=end)


#   rank 0 | v0.F0        lm0.F0                 lm0.B0 lm0.W0
#   rank 1 |       v1.F0         lm1.F0  lm1.B0
ROWS = (
    (
        _op("v0.F0", 0, 10),
        _op("lm0.F0", 26, 36),
        _op("lm0.B0", 67, 77),
        _op("lm0.W0", 77, 82),
    ),
    (_op("v1.F0", 13, 23), _op("lm1.F0", 39, 49), _op("lm1.B0", 49, 64)),
)


def _schedule(rows: tuple[tuple[ScheduledOp, ...], ...] = ROWS, **changes: object) -> Schedule:
    base = Schedule(
        problem_sha256="ab",
        makespan_ns=82,
        lower_bound_ns=50,
        peak_memory_bytes=(8, 8),
        ranks=rows,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _with(rank: int, index: int, **changes: object) -> Callable[[], Schedule]:
    def make() -> Schedule:
        row = list(ROWS[rank])
        row[index] = replace(row[index], **changes)  # type: ignore[arg-type]
        return _schedule(tuple(tuple(row) if r == rank else ROWS[r] for r in range(2)))

    return make


def _rows(first: tuple[ScheduledOp, ...], second: tuple[ScheduledOp, ...]) -> Schedule:
    return _schedule((first, second))


def test_a_valid_schedule_passes() -> None:
    check_schedule(_problem(), _schedule(), problem_sha256="ab")


def test_memory_is_released_before_it_is_taken_at_the_same_instant() -> None:
    problem, schedule = _problem(), _schedule()
    assert memory_timeline(problem, schedule) == (
        ((0, 8), (10, 0), (26, 8), (82, 0)),
        ((13, 8), (23, 0), (39, 8), (64, 0)),
    )
    assert memory_peaks(problem, schedule) == (8, 8)
    touching = replace(
        problem, microbatches=(Microbatch(passes=problem.microbatches[0].passes[:1]),) * 2
    )
    rows = (
        (_op("v0.F0", 0, 10), _op("v0.F1", 10, 20)),
        (_op("v1.F0", 13, 23), _op("v1.F1", 23, 33)),
    )
    check_schedule(touching, _schedule(rows, makespan_ns=33, lower_bound_ns=33))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with(0, 1, start_ns=25, end_ns=35), r"rank 0, op 1: lm0\.F0 starts at 25 ns; it waits "),
        (_with(0, 1, start_ns=26, end_ns=37), r"lm0\.F0 runs from 26 to 37 ns; .* takes 10 ns"),
        (_with(0, 2, strategy="lean"), r"lm0\.B0 has strategy 'lean', but its forward has 'keep'"),
        (_with(0, 2, strategy="none"), r"has strategy 'none'; it may be \['keep', 'lean'\]"),
        (_with(1, 2, start_ns=48, end_ns=63), r"rank 1, op 2: lm1\.B0 starts at 48 ns, before"),
        (_with(0, 3, key=parse_op("lm0.B0")), r"rank 0, op 3: lm0\.B0 stands twice; first as op 2"),
        (_with(0, 3, key=parse_op("v0.B0")), r"v0\.B0 is a backward of a frozen pass"),
        (_with(0, 3, key=parse_op("lm1.F0")), r"op 3: lm1\.F0 belongs on rank 1"),
        (_with(0, 3, key=parse_op("lm0.F1")), r"lm0\.F1 belongs to a pass that the problem does"),
        (_with(0, 3, key=parse_op("lm2.F0")), r"lm2\.F0 names a stage that is not one of 2"),
        (_with(0, 0, start_ns=-1, end_ns=9), r"v0\.F0 runs from -1 to 9 ns"),
        (lambda: _rows(ROWS[0], ROWS[1][:2]), r"rank 1: lm1\.B0 is missing"),
        (lambda: _rows(ROWS[0][:2], ROWS[1]), r"rank 0: lm0\.B0 is missing"),
        (lambda: _schedule(ranks=ROWS[:1]), "ranks has 1 entries; the problem has 2 ranks"),
        (lambda: _schedule(makespan_ns=83), "makespan_ns is 83, but the last op ends at 82"),
        (lambda: _schedule(lower_bound_ns=83), "lower_bound_ns is 83, which the makespan"),
        (lambda: _schedule(peak_memory_bytes=(8, 9)), "rank 1: peak_memory_bytes is 9, but"),
        (lambda: _schedule(problem_sha256="cd"), "problem_sha256 is 'cd', but"),
    ],
)
def test_a_broken_rule_is_told(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(PlanInvalidError, match=message) as caught:
        check_schedule(_problem(), make(), problem_sha256="ab")
    assert "\n" not in str(caught.value)


def test_memory_over_capacity_names_the_forward() -> None:
    problem = _problem(memory_capacity_bytes=(16, 7))
    with pytest.raises(PlanInvalidError, match=r"rank 1, op 0: v1\.F0 brings held memory to 8 byt"):
        check_schedule(problem, _schedule())


def test_an_unsplit_backward_takes_the_weight_gradient_too() -> None:
    rows = (ROWS[0][:3], ROWS[1])
    with pytest.raises(PlanInvalidError, match=r"lm0\.B0 runs from 67 to 77 ns; .* takes 15 ns"):
        check_schedule(_problem(), _schedule(rows, makespan_ns=77))


def test_ops_of_no_duration_may_not_wait_for_each_other_in_a_ring() -> None:
    nothing = Strategy(name="keep", forward_ns=0, backward_ns=0, weight_grad_ns=0, memory_bytes=0)
    one = Pass(module="m", sub_microbatch=0, stages=((nothing,),) * 2, frozen=True)
    problem = Problem(
        pipeline_size=2,
        memory_capacity_bytes=(0, 0),
        modules={"m": 1, "n": 1},
        microbatches=(Microbatch(passes=(one, replace(one, module="n", after=(("m", 0),)))),) * 2,
    )
    good = (
        ("m0.F0", "m0.F1", "n0.F0", "n0.F1"),
        ("m1.F0", "m1.F1", "n1.F0", "n1.F1"),
    )
    ring = (
        ("m0.F0", "n0.F0", "m0.F1", "n0.F1"),
        ("m1.F1", "m1.F0", "n1.F0", "n1.F1"),
    )

    def check(names: tuple[tuple[str, ...], ...]) -> None:
        rows = tuple(tuple(_op(name, 0, 0) for name in row) for row in names)
        check_schedule(
            problem,
            _schedule(rows, makespan_ns=0, lower_bound_ns=0, peak_memory_bytes=(0, 0)),
        )

    check(good)
    with pytest.raises(PlanInvalidError, match="waits for itself through the orders of the ranks"):
        check(ring)


def test_the_scheduler_of_these_tests_makes_valid_schedules_of_every_kind() -> None:
    seen = set()
    for seed in range(60):
        sample = draw_sample(random.Random(seed), ordered=bool(seed % 2))
        check_schedule(sample.problem, sample.schedule)
        kinds = {op.kind for row in sample.schedule.ranks for op in row}
        seen.add((sample.problem.pipeline_size, OpKind.W in kinds))
        seen |= {("frozen", node.frozen) for node in sample.problem.graph.nodes.values()}
    assert {(4, True), (1, True), ("frozen", True)} <= seen
