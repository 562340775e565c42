"""Whatever the search finds can be compiled, verified, written down and read back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.compiler.lowering import Windows, compile_plan
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.plan import PassPayload
from megatron_pipeweaver.ir.plan_codec import fingerprint, plan_from_json, plan_to_json
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.anytime import solve
from tests.property.problems import problems
from tests.unit.compiler.judge import judged as verify

QUICK = SearchConfig(max_rounds=3, time_budget_ns=5_000_000)


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    forward_only=st.booleans(),
    windows=st.builds(Windows, receive=st.integers(0, 9), send=st.integers(0, 9)),
)
def test_every_searched_schedule_becomes_a_verified_plan(
    problem: Problem, forward_only: bool, windows: Windows
) -> None:
    schedule = solve(problem, QUICK).schedule
    payload = PassPayload(item_start=0, item_stop=1, hidden_shape=(3, 1, 2), output_shape=(5,))
    plan = compile_plan(
        problem,
        schedule,
        dict.fromkeys(problem.graph.nodes, payload),
        dict.fromkeys(problem.modules, "bfloat16"),
        forward_only=forward_only,
        windows=windows,
    )
    assert plan.makespan_ns <= schedule.makespan_ns
    assert verify(plan).fingerprint == fingerprint(plan_from_json(plan_to_json(plan)))
