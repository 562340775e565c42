"""The executor on gloo ranks: equal to one process to the last bit, and no failure hangs.

Many cases run inside one set of processes: pipelines of 4, and two replicas of 2 side by side.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import PlanMismatchError, TransferError
from megatron_pipeweaver.ir.codec import trace_from_json, trace_to_json
from megatron_pipeweaver.ir.plan import ActionKind, TransferAction, VerifiedPlan
from megatron_pipeweaver.ir.plan_codec import plan_from_json, plan_to_json
from megatron_pipeweaver.ir.plan_text import format_action
from megatron_pipeweaver.ir.trace import Trace, TraceKind
from megatron_pipeweaver.runtime.agreement import agree, broadcast_bytes, gather_bytes
from megatron_pipeweaver.runtime.executor import Executor
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.stage import ModuleStages
from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport
from megatron_pipeweaver.runtime.watchdog import StoreBoard, WatchConfig, Watchdog
from megatron_pipeweaver.view.layout import schedule_of_trace
from tests.distributed.harness import RankContext, outcomes_of_ranks, run_on_ranks
from tests.distributed.toy import (
    build_chunks,
    draw_plan,
    gradients,
    loss_of,
    run_in_one_process,
    stages_of,
)

CPU = torch.device("cpu")
CASES = [(4, seed) for seed in range(14)] + [(2, seed) for seed in range(100, 106)]
SHAPE = {"max_segments": 3}


def _plan(size: int, seed: int, replica: int = 0) -> VerifiedPlan:
    return draw_plan(seed + 1000 * replica, pipeline_size=size, forward_only=seed % 7 == 6, **SHAPE)


def _run(
    ctx: RankContext, verified: VerifiedPlan, rank: int, transport: ProcessGroupTransport
) -> tuple[Any, Recorder]:
    plan = verified.plan

    def note(index: int) -> None:
        ctx.note(f"action {index}: {format_action(plan, plan.ranks[rank][index])}")

    stages, chunks = stages_of(plan, rank)
    recorder = Recorder(7, on_action=note)
    Executor(rank, stages, transport, recorder).run(verified)
    if not plan.forward_only:
        stages.fill_missing_gradients()
    return (stages.losses, gradients(chunks)), recorder


def _all_cases(ctx: RankContext) -> dict[str, Any]:
    timeout = timedelta(seconds=60)
    world = dist.group.WORLD
    assert world is not None
    one = ProcessGroupTransport([range(4)], device=CPU, timeout=timeout)
    two = ProcessGroupTransport([(0, 1), (3, 2)], device=CPU, timeout=timeout)
    result: dict[str, Any] = {"values": {}, "traces": {}}
    for size, seed in CASES:
        replica = 0 if size == 4 else ctx.rank // 2
        rank = ctx.rank if size == 4 else (0, 1, 1, 0)[ctx.rank]
        if seed % 5 == 1 and rank == 1:
            time.sleep(0.2)  # a peer that comes late is waited for
        if size == 4:  # as in training: one rank plans, all verify what they got
            ctx.note("broadcast of the plan")
            sent = plan_to_json(_plan(size, seed).plan) if ctx.rank == 2 else None
            verified = verify(plan_from_json(broadcast_bytes(sent, world, 2)))
            agree({"plan": verified.fingerprint}, world)
        else:
            verified = _plan(size, seed, replica)
        values, recorder = _run(ctx, verified, rank, one if size == 4 else two)
        result["values"][size, seed, replica] = values
        if size == 4:
            times = recorder.gather(world, None if ctx.rank == 1 else ctx.rank)
            assert times.peak_bytes == (0, None, 2, 3)
            trace = times.trace(verified.plan, verified.fingerprint)
            assert times.duration_ns == trace.duration_ns
            assert times.bubble() == pytest.approx(schedule_of_trace(trace).bubble())
            result["traces"][seed] = trace_to_json(trace)
    result["gathered"] = gather_bytes(b"x" * ctx.rank, world)
    result["mismatch"] = _disagree(ctx, world)
    return result


def _disagree(ctx: RankContext, world: dist.ProcessGroup) -> list[str]:
    """What this rank hears when rank 3 holds another plan, and when rank 1 cannot go on."""
    plan = _plan(4, 3).plan
    if ctx.rank == 3:
        plan = replace(plan, makespan_ns=plan.makespan_ns + 1)
    heard = []
    for plans, failure in ((plan, ""), (_plan(4, 3).plan, "no data" if ctx.rank == 1 else "")):
        ctx.note("agree")
        try:
            agree({"plan": verify(plans).fingerprint}, world, failure=failure)
        except PlanMismatchError as error:
            heard.append(str(error))
    return heard


@pytest.fixture(scope="module", name="ranks")
def _ranks() -> list[dict[str, Any]]:
    return run_on_ranks(_all_cases, 4)


@pytest.mark.parametrize(("size", "seed"), CASES)
def test_gloo_ranks_equal_one_process(ranks: list[dict[str, Any]], size: int, seed: int) -> None:
    for replica in range(4 // size):
        key = (size, seed, replica)
        parts = [one["values"][key] for one in ranks if key in one["values"]]
        losses = {name: value for part in parts for name, value in part[0].items()}
        grads = {name: value for part in parts for name, value in part[1].items()}
        expected_losses, expected = run_in_one_process(_plan(size, seed, replica).plan)
        assert losses.keys() == expected_losses.keys()
        assert grads.keys() == expected.keys()
        assert all(torch.equal(losses[name], expected_losses[name]) for name in losses)
        assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_the_cases_cover_what_they_should() -> None:
    plans = [_plan(size, seed).plan for size, seed in CASES]
    assert {plan.modules["language"] for plan in plans} == {1, 2, 3}
    assert any(plan.forward_only for plan in plans)
    assert any(one.frozen for plan in plans for one in plan.passes)
    images = [
        sum(one.key == (index, "vision", one.key.sub_microbatch) for one in plan.passes)
        for plan in plans
        if "vision" in plan.modules
        for index in {one.key.microbatch for one in plan.passes}
    ]
    assert 0 in images
    assert 3 in images
    actions = [one for plan in plans for row in plan.ranks for one in row]
    groups = [one for one in actions if isinstance(one, TransferAction) and len(one.messages) > 1]
    assert {one.kind for one in groups} == {ActionKind.ISEND, ActionKind.IRECV}


def test_traces_hold_every_action_of_every_rank(ranks: list[dict[str, Any]]) -> None:
    for seed, data in ranks[0]["traces"].items():
        assert all(one["traces"][seed] == data for one in ranks)
        trace: Trace = trace_from_json(data)
        plan = _plan(4, seed)
        assert (trace.iteration, trace.plan_sha256) == (7, plan.fingerprint)
        assert [len(rows) for rows in trace.ranks] == [len(row) for row in plan.plan.ranks]
        ended = {
            row.key: row.end_ns
            for rows in trace.ranks
            for row in rows
            if row.kind is TraceKind.COMPUTE
        }
        for rows in trace.ranks:
            for row in rows:
                if row.kind is TraceKind.WAIT:  # one clock for all ranks of this host
                    assert row.end_ns > ended[row.key]


def test_bytes_of_any_length_are_gathered(ranks: list[dict[str, Any]]) -> None:
    assert all(one["gathered"] == (b"", b"x", b"xx", b"xxx") for one in ranks)


def test_a_plan_that_differs_on_one_rank_is_refused_by_all(ranks: list[dict[str, Any]]) -> None:
    for one in ranks:
        other_plan, failed = one["mismatch"]
        assert other_plan.startswith("ranks [3] of [0, 1, 2, 3] hold another plan")
        assert failed == "rank 1 cannot run the plan: no data"


def _peer_fails(ctx: RankContext, dies: bool) -> None:
    """Rank 1 connects, then dies or does nothing; rank 0 runs."""
    transport = ProcessGroupTransport([(0, 1)], device=CPU, timeout=timedelta(seconds=1))
    dist.barrier()
    if ctx.rank == 1:
        if dies:
            os._exit(9)
        time.sleep(30)
    _run(ctx, _plan(2, 100), 0, transport)


@pytest.mark.parametrize("dies", [True, False])
def test_a_peer_that_is_gone_is_named_in_seconds(dies: bool) -> None:
    first, second = outcomes_of_ranks(_peer_fails, 2, dies, grace_s=15.0 if dies else 0.5)
    assert isinstance(first.error, TransferError), first.describe()
    text = str(first.error)
    assert text.startswith("rank 0, action ")
    assert "rank 1 did not go through" in text
    assert "see that rank's log" in text
    assert second.hung is not dies


class _Broken(ModuleStages):
    def backward(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        raise ValueError("this stage is broken")


class _Dying(ModuleStages):
    def backward(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        os._exit(9)


def _stage_fails(ctx: RankContext, wrong: type[ModuleStages]) -> None:
    """Rank 2's first backward raises, or is the end of it; the others have a minute's patience."""
    transport = ProcessGroupTransport([range(4)], device=CPU, timeout=timedelta(seconds=60))
    plan = _trained_plan()
    dist.barrier()
    if ctx.rank == 2:
        stages: ModuleStages = wrong(plan.plan, build_chunks(plan.plan, 2), loss_of)
    else:
        stages, _ = stages_of(plan.plan, ctx.rank)
    watchdog = Watchdog(ctx.rank, StoreBoard(_get_default_store(), "0"), WatchConfig())
    with watchdog.watching(plan.plan, 5) as at:
        Executor(ctx.rank, stages, transport, Recorder(5, on_action=at)).run(plan)


def _trained_plan() -> VerifiedPlan:
    plans = (draw_plan(seed, pipeline_size=4) for seed in range(50))
    return next(plan for plan in plans if not any(one.frozen for one in plan.plan.passes))


def test_a_rank_that_fails_takes_the_others_down_long_before_their_time_limit() -> None:
    outcomes = outcomes_of_ranks(_stage_fails, 4, _Broken, grace_s=30.0)
    for rank, one in enumerate(outcomes):
        assert isinstance(one.error, ValueError if rank == 2 else TransferError), one.describe()
        if rank != 2:
            assert str(one.error).startswith(f"rank {rank}, action ")
            assert "rank 2: failed: ValueError: this stage is broken" in str(one.error)


def test_a_rank_that_dies_in_the_middle_takes_the_others_down_in_seconds() -> None:
    outcomes = outcomes_of_ranks(_stage_fails, 4, _Dying, grace_s=30.0)
    assert outcomes[2].exit_code == 9
    for rank, one in enumerate(outcomes):
        if rank != 2:
            assert isinstance(one.error, TransferError), one.describe()
            text = str(one.error)
            assert text.startswith(f"rank {rank}, action ")
            assert "did not go through" in text
            assert [line[:6] for line in text.splitlines()[-4:]] == [f"rank {n}" for n in range(4)]
