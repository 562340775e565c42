"""The schedule function in Megatron's place: its duties, its errors, Megatron's own beside it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_with_interleaving

from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import PlanMismatchError
from megatron_pipeweaver.planner.wire import decode
from megatron_pipeweaver.plugin import schedule as schedule_module
from megatron_pipeweaver.plugin.schedule import IterationReport, PipeWeaverSchedule
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import (
    Case,
    RandomCosts,
    Trainer,
    installed,
    megatron_ranks,
    random_batch,
    schedule_for,
)
from tests.unit.models.examples import batch, cut, language_only, vision_language

TEXT = Case(
    spec=language_only(layers=8),
    layout=cut(4, language=[1] * 8),
)
IMAGES = Case(
    spec=vision_language(vision_layers=4, language_layers=8),
    layout=cut(4, vision=[1] * 4, language=[1] * 8),
)


def like_megatron(ctx: RankContext) -> tuple[float, int]:
    """Our schedule and Megatron's interleaved one on the same chunks and microbatches."""
    furthest, compared = 0.0, 0
    with megatron_ranks(4, TEXT.layout.virtual_size) as groups:
        trainer = Trainer(TEXT, groups)
        config = trainer.model[0].config
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        for number in range(2):
            microbatches = [batch(0, samples=2, seed=10 * number + index) for index in range(8)]
            ctx.note(f"batch {number}: Megatron")
            # 0.16.1 frees outputs under sends that gloo has not finished.
            config.deallocate_pipeline_outputs = False
            theirs = trainer.step(microbatches)
            config.deallocate_pipeline_outputs = True
            their_grads = trainer.gradients()
            ctx.note(f"batch {number}: PipeWeaver")
            with installed(schedule_for(TEXT, seed=number)):
                ours = trainer.step(microbatches)
            for mine, other in zip(ours, theirs, strict=True):
                furthest = max(furthest, float((mine["lm loss"] - other["lm loss"]).abs()))
            for name, grad in trainer.gradients().items():
                furthest = max(furthest, float((grad - their_grads[name]).abs().max()))
                compared += 1
    return furthest, compared


def test_text_alone_trains_as_with_megatrons_interleaved_schedule() -> None:
    found = run_on_ranks(like_megatron, 4)
    assert max(furthest for furthest, _ in found) < 1e-12
    assert min(compared for _, compared in found) > 0


def duties(ctx: RankContext) -> dict[str, Any]:
    """Everything around the gradients, on one model."""
    seen: dict[str, Any] = {}
    reports: list[IterationReport] = []
    with megatron_ranks(4, IMAGES.layout.virtual_size) as groups:
        trainer = Trainer(IMAGES, groups)
        rng = random.Random(1)
        microbatches = random_batch(rng)
        schedule = schedule_for(IMAGES, 3, gather_traces=True, on_iteration=reports.append)
        with installed(schedule):
            losses = trainer.step(microbatches)
            before = trainer.gradients()
            ctx.note("forward only")
            with torch.no_grad():
                evaluated = trainer.step(microbatches, forward_only=True)
            seen["untouched"] = all(not one.any() for one in trainer.gradients().values())
            ctx.note("loss scale")
            config = trainer.model[0].config
            config.grad_scale_func = lambda loss: loss * 8
            trainer.step(microbatches)
            scaled = trainer.gradients()
            ctx.note("a loss that is no number")
            config.grad_scale_func = lambda loss: loss * float("nan")
            trainer.step(microbatches)
            seen["nan"] = any(bool(one.isnan().any()) for one in trainer.gradients().values())
            config.grad_scale_func = None
            trainer.step(microbatches)
            after = trainer.gradients()
            seen["recovered"] = all(torch.equal(after[name], one) for name, one in before.items())
            seen["scaled"] = all(torch.equal(scaled[name], 8 * one) for name, one in before.items())
            seen["function"] = type(get_forward_backward_func()).__name__
        seen["restored"] = (
            get_forward_backward_func() is forward_backward_pipelining_with_interleaving
        )
        seen["losses"] = [float(one["lm loss"]) for one in losses]
        seen["evaluated"] = [float(one["lm loss"]) for one in evaluated]
        trace = reports[0].trace
        assert trace is not None
        seen["rows"] = [len(rank) for rank in trace.ranks]
        seen["actions"] = [len(rank) for rank in reports[0].received.plan.plan.ranks]
        seen["planned"] = reports[0].planned is not None
        seen["fingerprint"] = reports[0].received.plan.fingerprint
    return seen


def test_duties_of_a_schedule_function() -> None:
    found = run_on_ranks(duties, 4)
    for rank, seen in enumerate(found):
        assert seen["untouched"], "evaluation left gradients"
        assert seen["scaled"]
        assert seen["nan"], "every rank goes through the iteration to its end"
        assert seen["recovered"], "an iteration without numbers leaves nothing behind"
        assert seen["function"] == "InstalledSchedule"
        assert seen["restored"]
        assert seen["rows"] == seen["actions"]
        assert seen["planned"] == (rank == 0)
        assert seen["fingerprint"] == found[0]["fingerprint"]
        assert bool(seen["losses"]) == (rank == 3)
        assert seen["evaluated"] == seen["losses"]


Spoil = Callable[[int, list[Any], PipeWeaverSchedule, pytest.MonkeyPatch], None]


def alter_plan(
    rank: int, microbatches: list[Any], schedule: PipeWeaverSchedule, patch: pytest.MonkeyPatch
) -> None:
    """Rank 2 reads another plan than the rest."""

    def decode_another(data: bytes) -> Any:
        received = decode(data)
        plan = received.plan.plan
        other = dataclasses.replace(plan, makespan_ns=plan.makespan_ns + 1)
        return dataclasses.replace(received, plan=verify(other))

    if rank == 2:
        patch.setattr(schedule_module, "decode", decode_another)


def damage_plan(
    rank: int, microbatches: list[Any], schedule: PipeWeaverSchedule, patch: pytest.MonkeyPatch
) -> None:
    """Rank 1 receives half of the bytes."""
    if rank == 1:
        patch.setattr(schedule_module, "decode", lambda data: decode(data[: len(data) // 2]))


def alter_batch(
    rank: int, microbatches: list[Any], schedule: PipeWeaverSchedule, patch: pytest.MonkeyPatch
) -> None:
    """Rank 3 loads other images than the rest."""
    if rank == 3:
        microbatches[0] = batch(4, seed=1)


def no_memory(
    rank: int, microbatches: list[Any], schedule: PipeWeaverSchedule, patch: pytest.MonkeyPatch
) -> None:
    """A microbatch alone does not fit."""
    patch.setattr(schedule._source.planner, "_memory_capacity_bytes", (10,) * 4)


def lose_data(
    rank: int, microbatches: list[Any], schedule: PipeWeaverSchedule, patch: pytest.MonkeyPatch
) -> None:
    """The planning rank's loader fails."""
    if rank == 0:
        patch.setattr(schedule, "_describe", lambda one: one["no such key"])


FAULTS: list[tuple[Spoil, list[str]]] = [
    (alter_plan, ["ranks [2] of [0, 1, 2, 3] hold another plan"]),
    (damage_plan, ["rank 1 cannot run the plan"]),
    (alter_batch, ["ranks [3] of [0, 1, 2, 3] hold another batch"]),
    (no_memory, ["InfeasibleError", "bytes"]),
    (lose_data, ["KeyError: 'no such key'"]),
]


def faults(ctx: RankContext) -> list[str]:
    """One good iteration and one of every fault; the errors, as this rank sees them."""
    messages = []
    with megatron_ranks(4, IMAGES.layout.virtual_size) as groups:
        trainer = Trainer(IMAGES, groups)
        for spoil, _ in FAULTS:
            microbatches: list[Any] = [batch(2, seed=1), batch(0, seed=2)]
            schedule = schedule_for(IMAGES, 3, costs=RandomCosts(seed=1))
            with installed(schedule), pytest.MonkeyPatch.context() as patch:
                ctx.note(f"{spoil.__name__}: the good iteration")
                trainer.step(microbatches)
                spoil(ctx.rank, microbatches, schedule, patch)
                ctx.note(f"{spoil.__name__}: the bad iteration")
                with pytest.raises(PlanMismatchError) as caught:
                    trainer.step(microbatches)
            messages.append(str(caught.value))
    return messages


def test_faults_before_an_iteration_stop_every_rank_with_the_reason() -> None:
    for messages in run_on_ranks(faults, 4, deadline_s=100):
        for message, (spoil, wanted) in zip(messages, FAULTS, strict=True):
            for text in wanted:
                assert text in message, spoil.__name__
