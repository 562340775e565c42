"""The native core does what the plain-Python decoder does, op for op."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.interleave import NEVER, policy
from megatron_pipeweaver.search.native import KINDS, NativeProblem
from megatron_pipeweaver.search.reference import Unsupported, decode
from tests.property.problems import problems

KEYS = st.one_of(st.integers(0, 3), st.integers(0, 1000))


@settings(max_examples=250, deadline=None)
@given(problems(most_microbatches=3), st.data())
def test_core_equals_reference(problem: Problem, data: st.DataObject) -> None:
    draw = data.draw
    in_order = draw(st.booleans())
    try:
        native = NativeProblem(problem, in_order=in_order)
    except ConfigError:
        assume(False)
    counts = native.level_counts()
    made = policy(problem, [draw(st.integers(0, count - 1)) for count in counts])
    count = len(problem.microbatches)
    seed = draw(st.randoms(use_true_random=False))
    most = draw(st.sampled_from([2, 10, 1000]))
    made.key = [seed.randrange(most) for _ in range(3 * len(counts))]
    made.load = [seed.randrange(4) for _ in range(count)]
    made.load_limit = draw(st.sampled_from([0, 3, 6, NEVER]))
    made.release = [seed.choice([0, 0, 5, 100]) for _ in range(count)]
    made.split = draw(st.booleans())
    made.alternate = draw(st.booleans())
    made.adaptive = draw(st.booleans())
    made.in_order = in_order
    made.patience = draw(st.sampled_from([0, 128, 256]))
    made.hold = draw(st.sampled_from([0, 0, 3, 50]))
    table = native.core.decode(made)
    try:
        expected = decode(problem, made)
    except Unsupported:
        assume(False)
    keys = [(key, stage) for key, one in native.passes for stage in range(len(one.stages))]

    def name(op: int) -> tuple:
        key, stage = keys[op // 3]
        return (KINDS[op % 3], *key, stage)

    assert [[name(op) for op in ops] for ops in table.order] == expected.order
    for op in (op for ops in table.order for op in ops):
        assert table.start[op] == expected.start_ns[name(op)]
        assert table.end[op] == expected.end_ns[name(op)]
    assert table.level == [expected.level[pair] for pair in range(len(counts))]


@settings(max_examples=60, deadline=None)
@given(problems(most_microbatches=3))
def test_retiming_a_decoded_order_gives_its_times_or_earlier_ones(problem: Problem) -> None:
    native = NativeProblem(problem)
    table = native.core.decode(policy(problem, [0] * len(native.level_counts())))
    again = native.core.retime(table.order, table.level, True)
    assert again.makespan <= table.makespan
    for ops in table.order:
        for op in ops:
            assert again.start[op] <= table.start[op]
