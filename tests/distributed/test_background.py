"""Planner faults while ranks train: losses and weights stay those of a run without faults."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.models.parameters import global_parameters
from megatron_pipeweaver.planner.background import BackgroundConfig, BackgroundSource
from megatron_pipeweaver.planner.child import PLANNER_COMMAND, RestartPolicy
from megatron_pipeweaver.planner.settings import CostSettings, PlannerSettings
from megatron_pipeweaver.planner.source import PlanCounters
from megatron_pipeweaver.plugin.schedule import IterationReport, PipeWeaverSchedule
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.options import RunOptions
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import (
    Case,
    Microbatch,
    Trainer,
    forward_step,
    installed,
    masked_mean,
    megatron_ranks,
    schedule_for,
)
from tests.unit.models.examples import batch, cut, describe, vision_language

MS = 1_000_000
ITERATIONS = 6
MICROBATCHES = 3
RANKS = 2
RATE = 0.05
CASE = Case(
    spec=vision_language(tied=True, vision_layers=4, language_layers=8),
    layout=cut(RANKS, vision=[2, 2], language=[2] * 4),
)


def settings(budget_ms: int) -> PlannerSettings:
    return PlannerSettings(
        model=CASE.spec,
        layout=CASE.layout,
        costs=CostSettings(device=load_device("cpu"), options=RunOptions.unfused(element_bytes=8)),
        sub_microbatch={"vision": CASE.images_per_pass},
        memory_capacity_bytes=(1 << 30,) * RANKS,
        dtypes={one.name: "float64" for one in CASE.spec.modules},
        search=SearchConfig(
            time_budget_ns=budget_ms * MS, deterministic=True, split_weight_grad=False
        ),
    )


def microbatches() -> Iterator[Microbatch]:
    rng = random.Random(7)
    while True:
        yield batch(rng.choice([0, 1, 2, 5]), seed=rng.randrange(10**6))


def train(
    trainer: Trainer, after: Callable[[int], None] = lambda iteration: None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of some steps of gradient descent, and the weights that they lead to."""
    losses = []
    one_iterator = microbatches()
    for iteration in range(ITERATIONS):
        for one in trainer.model:
            one.zero_grad_buffer()
        outcomes = get_forward_backward_func()(
            forward_step_func=partial(forward_step, masked_mean),
            data_iterator=[one_iterator] * len(trainer.model),
            model=trainer.model,
            num_microbatches=MICROBATCHES,
            seq_length=1,
            micro_batch_size=1,
        )
        losses += [one["lm loss"] for one in outcomes]
        for _, parameter in trained(trainer):
            parameter.data.add_(parameter.main_grad, alpha=-RATE)  # type: ignore[attr-defined]
        after(iteration)
    return losses, {name: one.detach().clone() for name, one in trained(trainer)}


def trained(trainer: Trainer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return global_parameters([one.module for one in trainer.model])


def patched(code: str) -> tuple[str, ...]:
    """The planner's process with `code` run first; in it, `p` is the process's module."""
    main = "import sys, time, megatron_pipeweaver.planner.process as p\n"
    return (sys.executable, "-P", "-c", f"{main}{code}\nsys.exit(p.main(sys.argv[1:]))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong, and what the counters of `ITERATIONS` iterations must say."""

    command: Sequence[str] = PLANNER_COMMAND
    send: signal.Signals | None = None
    """Sent to the planner behind the second iteration, while it plans the third."""
    budget_ms: int = 20
    config: BackgroundConfig = field(default_factory=BackgroundConfig)
    expected: Callable[[PlanCounters], bool]


AT_ONCE = RestartPolicy(most=2, backoff_ns=0)


def patient(**more: Any) -> BackgroundConfig:
    return BackgroundConfig(
        **{"wait_ns": 20_000 * MS, "restarts": AT_ONCE, "cached_plans": 0, **more}
    )


def all_static(found: PlanCounters) -> bool:
    return (found.planned, found.static, found.failed, found.restarted) == (
        0,
        ITERATIONS,
        AT_ONCE.most + 1,
        AT_ONCE.most,
    )


FAULTS: dict[str, Fault] = {
    "none": Fault(
        config=patient(cached_plans=8),
        # Two of the batches have the same metadata; what is learnt in between decides the rest.
        expected=lambda found: replace(found, cached=0) == PlanCounters(planned=ITERATIONS),
    ),
    "killed mid-search": Fault(
        send=signal.SIGKILL,
        budget_ms=1_500,  # the first search ahead knows of no other limit
        config=patient(),
        # Whether the iteration after it waits for the new process depends on who sees it first.
        expected=lambda found: (
            (found.failed, found.restarted, found.late) == (1, 1, 0)
            and found.static in (0, 1)
            and found.planned + found.static == ITERATIONS
        ),
    ),
    "hung": Fault(
        send=signal.SIGSTOP,
        config=patient(wait_ns=1_000 * MS, hang_ns=500 * MS),
        # Where an iteration takes long, the new process may plan in time for the next one.
        expected=lambda found: (
            found.failed >= 1
            and found.restarted >= 1
            and found.planned + found.static == ITERATIONS
        ),
    ),
    "out of memory": Fault(
        command=patched("p.PlanningDesk.answer = lambda desk, message: bytearray(1 << 62)"),
        config=patient(),
        expected=all_static,
    ),
    "garbage": Fault(
        command=patched("import os; os.write(int(sys.argv[1]), b'garbage ' * 99); time.sleep(60)"),
        config=patient(),
        expected=all_static,
    ),
    "no JSON": Fault(
        command=patched("p.PlanningDesk.answer = lambda desk, message: b'{}'"),
        config=patient(),
        expected=all_static,
    ),
    "a cut plan": Fault(
        command=patched("whole = p.encode; p.encode = lambda *args: whole(*args)[:-200]"),
        config=patient(),
        expected=all_static,
    ),
    "another batch's plan": Fault(
        command=patched("whole = p.encode; p.encode = lambda plan, digest: whole(plan, 'x')"),
        config=patient(),
        expected=all_static,
    ),
    "late every time": Fault(
        command=patched("p.PlanningDesk.answer = lambda desk, message: time.sleep(60)"),
        config=patient(wait_ns=50 * MS),
        expected=lambda found: (
            (found.planned, found.static, found.late) == (0, ITERATIONS, ITERATIONS)
            and found.failed == 0
        ),
    ),
    "cannot be started": Fault(
        command=("/no/such/planner",),
        config=patient(),
        expected=all_static,
    ),
}


def run_faults(ctx: RankContext, names: Sequence[str]) -> dict[str, Any]:
    """Every fault on a model of its own; (equal, counters, origins) by fault."""
    found = {}
    with megatron_ranks(RANKS, CASE.layout.virtual_size) as groups:
        ctx.note("in this process")
        with installed(schedule_for(CASE, seed=1)):
            losses, weights = train(Trainer(CASE, groups))
        assert len(losses) == (ITERATIONS * MICROBATCHES if ctx.rank == RANKS - 1 else 0)
        for name in names:
            ctx.note(name)
            fault = FAULTS[name]
            source = BackgroundSource(
                settings(fault.budget_ms), fault.config, command=fault.command
            )
            reports: list[IterationReport] = []

            def after(iteration: int, fault: Fault = fault, source: Any = source) -> None:
                if iteration == 1 and fault.send and source.process is not None:
                    os.kill(source.process, fault.send)

            schedule = PipeWeaverSchedule(
                source, describe, gather_traces=True, on_iteration=reports.append
            )
            trainer = Trainer(CASE, groups)
            with installed(schedule):
                theirs, their_weights = train(trainer, after)
            equal = len(theirs) == len(losses) and all(map(torch.equal, theirs, losses))
            equal &= all(torch.equal(their_weights[one], weights[one]) for one in weights)
            process = source.process
            source.close()
            found[name] = (
                equal,
                source.counters,
                [one.received.origin.value for one in reports],
                process is None or not is_running(process),
                (len(source._intervals_ns), len(source.errors_permille)),
            )
            dist.barrier()
    return found


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "names", [list(FAULTS)[:3], list(FAULTS)[3:]], ids=["processes", "answers"]
)
def test_training_goes_on_as_if_nothing_had_happened(names: list[str]) -> None:
    ranks = run_on_ranks(run_faults, RANKS, names, deadline_s=150)
    for name in names:
        for rank, found in enumerate(ranks):
            equal, counters, origins, gone, (ahead, measured) = found[name]
            assert equal, (name, rank)
            assert gone, (name, rank)
            assert origins == ranks[0][name][2], (name, rank)
            if rank == 0:
                assert FAULTS[name].expected(counters), (name, str(counters))
                assert origins.count("static") == counters.static, name
                if name == "none":
                    assert ahead >= ITERATIONS - 3, "the next batch was not planned ahead"
                    assert measured >= ITERATIONS - 2, "nothing was learnt from the traces"
            else:
                assert counters == PlanCounters(), "another rank than the planning one planned"
