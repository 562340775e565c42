from collections.abc import Mapping

import pytest

from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.problem import OpKind, Problem, dependencies
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.partition.tune import Job, evaluate, parallel_choices, tune
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import setup_preset

IMAGE = Item(units=2704, tokens=169)


def _job(images: Mapping[int, int]) -> Job:
    return Job(
        model=setup_preset("vlm-s").model,
        device=load_device("H800"),
        microbatches=tuple(
            MicrobatchMetadata(sequence_length=8192, items={"vision": (IMAGE,) * count})
            for count in images.values()
        ),
        options=RunOptions(),
    )


JOB = _job({0: 4, 1: 0, 2: 2, 3: 8})


def one_by_one(problem: Problem) -> Schedule:
    """A microbatch after another at the leanest strategy, each op as early as can be."""
    free = [0] * problem.pipeline_size
    ends: dict[object, int] = {}
    ranks: list[list[ScheduledOp]] = [[] for _ in free]
    waiting = list(problem.graph.ops())
    while waiting:
        op = next(
            one
            for one in waiting
            if all(before.op in ends for before in dependencies(problem.graph, one))
        )
        waiting.remove(op)
        owner = problem.microbatches[op.microbatch].passes
        stages = next(
            one.stages
            for one in owner
            if (one.module, one.sub_microbatch) == (op.module, op.sub_microbatch)
        )
        best = min(stages[op.stage], key=lambda one: one.memory_bytes)
        rank = problem.graph.rank_of(op.stage)
        start = max(
            free[rank],
            *(ends[one.op] + one.latency_ns for one in dependencies(problem.graph, op)),
            0,
        )
        time = best.forward_ns if op.kind is OpKind.F else best.backward_ns + best.weight_grad_ns
        ends[op] = free[rank] = start + time
        ranks[rank].append(
            ScheduledOp(key=op, strategy=best.name, start_ns=start, end_ns=start + time)
        )
    return Schedule(
        problem_sha256="",
        makespan_ns=max(free),
        lower_bound_ns=0,
        peak_memory_bytes=(0,) * problem.pipeline_size,
        ranks=tuple(map(tuple, ranks)),
    )


def test_choices_fill_the_ranks_and_divide_heads_and_microbatches() -> None:
    found = {
        (one.data, one.tensor, one.pipeline)
        for one in parallel_choices(8, 4, JOB.device, JOB.model)
    }
    assert found == {
        (4, 1, 2),
        (2, 1, 4),
        (1, 1, 8),
        (4, 2, 1),
        (2, 2, 2),
        (1, 2, 4),
        (2, 4, 1),
        (1, 4, 2),
        (1, 8, 1),
    }


def test_tuning_ranks_what_fits() -> None:
    choices = [
        ParallelSizes(pipeline=4, tensor=4, sequence_parallel=True),
        ParallelSizes(pipeline=2, tensor=4, data=2, sequence_parallel=True),
        ParallelSizes(pipeline=1, tensor=1, data=16),  # neither dealt evenly nor small enough
    ]
    found = tune(JOB, 16, one_by_one, choices=choices)
    assert {one.parallel for one in found} == set(choices[:2])
    times = [one.report.iteration_ns for one in found]
    assert times == sorted(times)
    assert all(0 < one.report.mfu < 1 for one in found)
    assert all(max(one.report.state_bytes) < JOB.device.spec.memory_bytes for one in found)


def test_the_heaviest_replica_decides() -> None:
    parallel = ParallelSizes(pipeline=2, tensor=8, data=2, sequence_parallel=True)
    uneven = evaluate(_job({0: 8, 1: 0, 2: 8, 3: 0}), parallel, one_by_one)
    even = evaluate(_job({0: 8, 1: 8, 2: 0, 3: 0}), parallel, one_by_one)
    assert uneven.report.iteration_ns > even.report.iteration_ns


def test_microbatches_that_cannot_be_dealt_are_refused() -> None:
    parallel = ParallelSizes(pipeline=1, tensor=8, data=3)
    with pytest.raises(ConfigError, match="4 microbatches cannot be dealt to 3"):
        evaluate(JOB, parallel, one_by_one)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"pipeline": 1, "tensor": 3}, "over 3 ranks: module 'vision' has 16 attention heads"),
        ({"pipeline": 128, "tensor": 1}, "pipeline of 128 ranks: no module has more than 63"),
    ],
)
def test_sizes_that_no_module_can_be_cut_into_are_refused(sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        evaluate(JOB, ParallelSizes(**sizes), one_by_one)


def test_nothing_fits_says_what_to_do() -> None:
    with pytest.raises(InfeasibleError, match="use more ranks"):
        tune(JOB, 1, one_by_one)
