"""What Megatron's training does around a schedule goes on under PipeWeaver's."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_pipeweaver.ir.codec import problem_from_json, schedule_from_json, trace_from_json
from tests.distributed.conftest import Jobs
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.jobs import pipeline
from tests.distributed.pretraining import ENVIRONMENT, Heard, Run, close, start

pytestmark = pytest.mark.timeout(900)  # whoever asks first waits for all jobs

NUMBERS = {
    "planned-ms",
    "measured-ms",
    "search-ms",
    "planned-bubble",
    "measured-bubble",
    "fallback",
    "items-per-microbatch-min",
    "items-per-microbatch-mean",
    "items-per-microbatch-max",
}


def scalars(folder: Path) -> Mapping[str, Sequence[tuple[int, float]]]:
    """Step and value of all numbers in TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_per_token_loss_clipping_and_a_growing_batch_are_those_of_plain_megatron(
    jobs: Jobs,
) -> None:
    plain, found = jobs.heard["plain, ramped"], jobs.heard["ramped"]
    assert len(plain.losses) == 8  # four batches of 4 samples, four of 8
    assert min(plain.grad_norms.values()) > 0.5  # so that clipping has something to do
    close(found, plain)


def test_numbers_reach_tensorboard_in_every_iteration(jobs: Jobs) -> None:
    found = scalars(jobs.directory / "board")
    for name in NUMBERS:
        values = found[f"pipeweaver/{name}"]
        assert [step for step, _ in values] == list(range(1, 9)), name
        assert all(value >= 0 for _, value in values), name
    assert all(0 < value < 1 for _, value in found["pipeweaver/planned-bubble"])
    assert all(value in (0, 1) for _, value in found["pipeweaver/fallback"])
    assert any(value > 0 for _, value in found["pipeweaver/items-per-microbatch-max"])
    # Megatron's own numbers, its timers among them.
    assert "lm loss" in found
    assert "forward-backward-time" in found


def test_numbers_reach_weights_and_biases_in_every_iteration(jobs: Jobs) -> None:
    logged = jobs.heard["ramped"].wandb
    for name in NUMBERS:
        assert len(logged[f"pipeweaver/{name}"]) == 8, name


def test_plans_and_traces_are_kept(jobs: Jobs) -> None:
    folder = jobs.directory / "traces"
    for iteration in range(1, 9):
        stem = f"iteration-{iteration:07d}"
        problem = problem_from_json((folder / f"{stem}.problem.json").read_bytes())
        schedule = schedule_from_json((folder / f"{stem}.schedule.json").read_bytes())
        trace = trace_from_json((folder / f"{stem}.trace.json").read_bytes())
        assert len(problem.microbatches) == (2 if iteration < 5 else 4)
        assert len(schedule.ranks) == len(trace.ranks) == 2


def near(found: Heard, expected: Heard, tolerance: float) -> None:
    assert list(found.losses) == list(expected.losses)
    for iteration, loss in expected.losses.items():
        assert found.losses[iteration] == pytest.approx(loss, rel=tolerance), iteration


def test_bf16_trains_as_in_plain_megatron(jobs: Jobs) -> None:
    near(jobs.heard["bf16"], jobs.heard["plain, bf16"], 1e-2)


def test_fp16_skips_the_same_iterations_and_ends_at_the_same_loss_scale(jobs: Jobs) -> None:
    plain, found = jobs.heard["plain, fp16"], jobs.heard["fp16"]
    assert plain.skipped
    assert plain.losses
    assert found.skipped == plain.skipped
    assert found.loss_scales == plain.loss_scales
    near(found, plain, 1e-2)


def test_an_iteration_that_megatron_runs_twice_has_the_same_batch_and_the_same_plan(
    jobs: Jobs,
) -> None:
    found = jobs.heard["frozen, run twice"]
    close(found, jobs.heard["plain, frozen"])
    trained = [one for one in found.reruns if one != "rerun_disabled"]  # as in evaluation
    assert trained == ["initial_run", "first_rerun_reproducible"] * 2


def test_a_loss_that_is_no_number_ends_the_job_behind_a_second_run_and_a_checkpoint(
    jobs: Jobs,
) -> None:
    assert list(jobs.heard["poisoned"].losses) == [1]
    assert jobs.heard["poisoned"].reruns == ["initial_run", "first_rerun_reproducible"]
    assert jobs.heard["poisoned"].exit_code == 16  # Megatron's: resume to disambiguate
    assert (jobs.directory / "poisoned" / "iter_0000001").is_dir()


def plan_alone(ctx: RankContext, flags: Sequence[str]) -> str:
    """What a dry run prints, as rank 0 of eight."""
    os.environ["WORLD_SIZE"] = "8"
    run = Run(flags=flags)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert start(run, ctx.directory) == 0
    return printed.getvalue()


def test_a_dry_run_plans_on_one_process_and_ends() -> None:
    pytest.importorskip("megatron.training", reason="this megatron-core has no megatron.training")
    flags = [
        *pipeline(4, "--tensor-model-parallel-size", "2", "--pipeweaver-dry-run", "3"),
        *("--pipeweaver-device-profile", "H100", "--pipeweaver-segments", "language=1"),
    ]
    [printed] = run_on_ranks(plan_alone, 1, flags, environment=ENVIRONMENT, initialise=False)
    assert "language: 1 segment(s), layers per stage (1, 1, 1, 1)" in printed
    assert "--pipeweaver-layers " in printed
    table = printed[printed.index("best static") :].splitlines()
    assert [row.split()[0] for row in table if row[:1].isdigit()] == ["1", "2", "3"]
    assert "lm loss" not in printed  # nothing was trained
