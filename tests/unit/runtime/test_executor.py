"""The executor on ranks that are threads: equal to one process, and clear about what is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import (
    PipeWeaverError,
    PlanInvalidError,
    PlanMismatchError,
    TransferError,
)
from megatron_pipeweaver.ir.plan import (
    ActionKind,
    ComputeAction,
    PlanPass,
    TransferAction,
    VerifiedPlan,
)
from megatron_pipeweaver.ir.problem import OpKey, PassKey
from megatron_pipeweaver.ir.trace import TraceKind, trace_rows
from megatron_pipeweaver.runtime.executor import Executor
from megatron_pipeweaver.runtime.local import LocalNetwork, LocalTransport
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.stage import ModuleStages, StageRunner
from tests.distributed.toy import (
    draw_plan,
    gradients,
    loss_of,
    run_in_one_process,
    stages_of,
)


def _run_ranks(
    verified: VerifiedPlan,
    make: Callable[[int], StageRunner],
    network: LocalNetwork | None = None,
    ranks: tuple[int, ...] | None = None,
) -> tuple[dict[int, PipeWeaverError], dict[int, Recorder]]:
    """Run every rank in a thread; what each raised, and its recorder."""
    network = network or LocalNetwork()
    errors: dict[int, PipeWeaverError] = {}
    recorders = {rank: Recorder(0) for rank in range(verified.plan.pipeline_size)}

    def work(rank: int) -> None:
        try:
            Executor(rank, make(rank), LocalTransport(network), recorders[rank]).run(verified)
        except PipeWeaverError as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks or recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors, recorders


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("forward_only", [False, True])
def test_threads_equal_one_process(seed: int, forward_only: bool) -> None:
    verified = draw_plan(seed, forward_only=forward_only)
    ranks = [stages_of(verified.plan, rank) for rank in range(verified.plan.pipeline_size)]
    # Every other one without tags: in a pair's order alone, as on NCCL.
    network = LocalNetwork(by_order=seed % 2 == 1)
    errors, recorders = _run_ranks(verified, lambda rank: ranks[rank][0], network)
    assert errors == {}
    losses: dict[PassKey, Tensor] = {}
    found = {}
    for rank, (stages, chunks) in enumerate(ranks):
        if not forward_only:
            stages.fill_missing_gradients()
        losses |= stages.losses
        found |= gradients(chunks)
        assert not stages._alive
        assert len(recorders[rank].times_ns) == 2 * len(verified.plan.ranks[rank])
    expected_losses, expected = run_in_one_process(verified.plan)
    assert losses.keys() == expected_losses.keys()
    assert all(torch.equal(losses[key], expected_losses[key]) for key in losses)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_the_cases_above_hold_what_they_should() -> None:
    plans = [draw_plan(seed).plan for seed in range(16)]
    actions = [action for plan in plans for row in plan.ranks for action in row]
    strategies = {action.strategy for action in actions if isinstance(action, ComputeAction)}
    assert strategies == {"keep", "recompute"}
    assert any(one.frozen for plan in plans for one in plan.passes)
    assert {action.kind for action in actions} == set(ActionKind)
    per_microbatch = [
        sum(one.key.module == "vision" and one.key.microbatch == 0 for one in plan.passes)
        for plan in plans
        if "vision" in plan.modules
    ]
    assert 0 in per_microbatch
    assert max(per_microbatch) > 1
    assert max(len(one.messages) for one in actions if isinstance(one, TransferAction)) > 1


def _wide_plan() -> VerifiedPlan:
    return next(
        verified
        for verified in (draw_plan(seed, pipeline_size=2) for seed in range(50))
        if len(verified.plan.messages) > 4
    )


def test_rows_tell_every_action_in_order() -> None:
    verified = _wide_plan()
    plan = verified.plan
    _, recorders = _run_ranks(verified, lambda rank: stages_of(plan, rank)[0])
    for rank, recorder in recorders.items():
        rows = trace_rows(plan, rank, recorder.times_ns)
        assert all(row.start_ns <= row.end_ns for row in rows)
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(rows))
        for row, action in zip(rows, plan.ranks[rank], strict=True):
            if isinstance(action, ComputeAction):
                assert (row.kind, row.key, row.strategy) == (
                    TraceKind.COMPUTE,
                    action.op,
                    action.strategy,
                )
                assert row.peer is None
            else:
                messages = [plan.messages[one] for one in action.messages]
                assert (row.key, row.peer) == (messages[0].source, 1 - rank)
                assert row.size_bytes == sum(one.size_bytes for one in messages)


def test_only_verified_plans_run() -> None:
    verified = _wide_plan()
    executor = Executor(
        0, stages_of(verified.plan, 0)[0], LocalTransport(LocalNetwork()), Recorder(0)
    )
    with pytest.raises(PlanInvalidError, match="verified plans only"):
        executor.run(verified.plan)  # type: ignore[arg-type]
    with pytest.raises(PlanInvalidError, match="rank 2 is not one of the plan's 2"):
        Executor(
            2, stages_of(verified.plan, 0)[0], LocalTransport(LocalNetwork()), Recorder(0)
        ).run(verified)


def test_a_peer_that_never_comes_is_named_within_the_time_limit() -> None:
    verified = _wide_plan()
    network = LocalNetwork(timeout_s=0.05)
    errors, _ = _run_ranks(verified, lambda rank: stages_of(verified.plan, rank)[0], network, (1,))
    assert isinstance(errors[1], TransferError)
    text = str(errors[1])
    assert text.startswith("rank 1, action ")
    assert "WAIT_RECV" in text
    assert "from rank 0 did not arrive within 0.05 s" in text


class _Misshapen(ModuleStages):
    def forward(
        self, one: PlanPass, op: OpKey, strategy: str, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        return super().forward(one, op, strategy, inputs)[:, :1]


class _Forgetful(ModuleStages):
    def backward(
        self, one: PlanPass, op: OpKey, strategy: str, output_grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        return tuple(None for _ in super().backward(one, op, strategy, output_grads))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_Misshapen, r"rank 0, action \d+: `\w+0\.SEND_F.* was planned; the batch is not the one"),
        (_Forgetful, r"rank \d, action \d+: `\w+\.B.*returned no gradient for"),
    ],
)
def test_a_stage_that_does_not_fit_the_plan_is_told(
    wrong: type[ModuleStages], message: str
) -> None:
    verified = next(
        one
        for one in (draw_plan(seed, pipeline_size=2) for seed in range(50))
        if not any(each.frozen for each in one.plan.passes)
    )
    plan = verified.plan

    def make(rank: int) -> StageRunner:
        _, chunks = stages_of(plan, rank)
        return wrong(plan, chunks, loss_of)

    errors, _ = _run_ranks(verified, make, LocalNetwork(timeout_s=0.2))
    told = [str(error) for error in errors.values() if isinstance(error, PlanMismatchError)]
    assert told
    with pytest.raises(PlanMismatchError, match=message):
        raise next(error for error in errors.values() if isinstance(error, PlanMismatchError))


def test_a_plan_for_other_memory_still_runs_the_same() -> None:
    """What is verified is what runs: a changed plan is another plan, with another fingerprint."""
    verified = _wide_plan()
    capacity = tuple(one + 1 for one in verified.plan.memory_capacity_bytes)
    assert verify(replace(verified.plan, memory_capacity_bytes=capacity)).fingerprint != (
        verified.fingerprint
    )
