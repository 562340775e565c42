"""The dependency rule against an independent statement of `docs/formats.md`; round trips."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.ir.codec import problem_from_json, problem_to_json
from megatron_pipeweaver.ir.problem import (
    Microbatch,
    OpKey,
    OpKind,
    Pass,
    Problem,
    Strategy,
    dependencies,
    receivers,
)

SIZES = st.integers(0, 50)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@st.composite
def _stages(draw: st.DrawFn, count: int) -> tuple[tuple[Strategy, ...], ...]:
    return tuple(
        tuple(
            Strategy(
                name=name,
                forward_ns=draw(SIZES),
                backward_ns=draw(SIZES),
                weight_grad_ns=draw(SIZES),
                memory_bytes=draw(SIZES),
            )
            for name in draw(st.lists(NAMES, min_size=1, max_size=2, unique=True))
        )
        for _ in range(count)
    )


@st.composite
def any_problem(draw: st.DrawFn) -> Problem:
    """Any problem the format can tell, feasible or not: odd names, rings left out."""
    pipeline_size = draw(st.integers(1, 3))
    modules = draw(st.dictionaries(NAMES, st.integers(1, 2), min_size=1, max_size=3))
    microbatches = []
    for _ in range(draw(st.integers(0, 2))):
        passes: list[Pass] = []
        for module, segments in modules.items():
            for sub_microbatch in range(draw(st.integers(0, 2))):
                before = [(one.module, one.sub_microbatch) for one in passes]
                after = draw(st.lists(st.sampled_from(before), unique=True)) if before else []
                passes.append(
                    Pass(
                        module=module,
                        sub_microbatch=sub_microbatch,
                        after=tuple(after),
                        p2p_latency_ns=draw(SIZES),
                        stages=draw(_stages(pipeline_size * segments)),
                        frozen=draw(st.booleans()),
                    )
                )
        microbatches.append(Microbatch(passes=tuple(draw(st.permutations(passes)))))
    return Problem(
        pipeline_size=pipeline_size,
        memory_capacity_bytes=tuple(draw(SIZES) for _ in range(pipeline_size)),
        modules=modules,
        microbatches=tuple(microbatches),
    )


Wait = tuple[OpKey, OpKey, int]


def waits_as_the_format_says(problem: Problem) -> set[Wait]:
    """Every (waiting op, op waited for, latency), from the sentences of the format alone."""
    size = problem.pipeline_size
    waits: set[Wait] = set()

    def wait(waiting: OpKey, ended: OpKey, latency_ns: int) -> None:
        same_rank = waiting.stage % size == ended.stage % size
        waits.add((waiting, ended, 0 if same_rank else latency_ns))

    for index, microbatch in enumerate(problem.microbatches):
        by_name = {(one.module, one.sub_microbatch): one for one in microbatch.passes}
        for one in microbatch.passes:
            name = (index, one.module, one.sub_microbatch)
            last = len(one.stages) - 1
            for stage in range(last):
                # forward s waits for forward s-1, backward s waits for backward s+1
                ahead = OpKey(OpKind.F, *name, stage + 1)
                wait(ahead, OpKey(OpKind.F, *name, stage), one.p2p_latency_ns)
                if not one.frozen:
                    behind = OpKey(OpKind.B, *name, stage)
                    wait(behind, OpKey(OpKind.B, *name, stage + 1), one.p2p_latency_ns)
            for stage in range(last + 1):
                if not one.frozen:
                    backward = OpKey(OpKind.B, *name, stage)
                    wait(backward, OpKey(OpKind.F, *name, stage), one.p2p_latency_ns)
                    wait(OpKey(OpKind.W, *name, stage), backward, one.p2p_latency_ns)
            for before in one.after:
                earlier = by_name[before]
                theirs, end = (index, *before), len(earlier.stages) - 1
                latency_ns = earlier.p2p_latency_ns  # "the earlier pass's counts"
                first = OpKey(OpKind.F, *name, 0)
                wait(first, OpKey(OpKind.F, *theirs, end), latency_ns)
                if not one.frozen and not earlier.frozen:
                    gradient = OpKey(OpKind.B, *name, 0)
                    wait(OpKey(OpKind.B, *theirs, end), gradient, latency_ns)
    return waits


@settings(max_examples=60, deadline=None)
@given(any_problem())
def test_dependencies_are_those_of_the_format(problem: Problem) -> None:
    told = [
        (op, wait.op, wait.latency_ns)
        for op in problem.graph.ops(split=True)
        for wait in dependencies(problem.graph, op)
    ]
    assert len(told) == len(set(told))
    assert set(told) == waits_as_the_format_says(problem)


@settings(max_examples=60, deadline=None)
@given(any_problem())
def test_every_op_can_run_after_those_it_waits_for(problem: Problem) -> None:
    waiting = {
        op: {one.op for one in dependencies(problem.graph, op)}
        for op in problem.graph.ops(split=True)
    }
    while ready := [op for op, before in waiting.items() if not before & waiting.keys()]:
        for op in ready:
            del waiting[op]
    assert not waiting


@settings(max_examples=60, deadline=None)
@given(any_problem())
def test_problem_files_round_trip(problem: Problem) -> None:
    data = problem_to_json(problem)
    again = problem_from_json(data)
    assert again == problem
    assert list(again.modules) == list(problem.modules)
    assert problem_to_json(again) == data


@given(any_problem())
@settings(max_examples=60, deadline=None)
def test_receivers_are_those_whose_dependencies_carry_data_read_the_other_way(
    problem: Problem,
) -> None:
    graph = problem.graph
    found = {(op, one) for op in graph.ops(split=True) for one in receivers(graph, op)}
    assert found == {
        (wait.op, op)
        for op in graph.ops(split=True)
        for wait in dependencies(graph, op)
        if wait.carries_data
    }
