"""The comparison that `scripts/gpu_check.sh` makes on a GPU, on gloo ranks: its logic alone."""

from __future__ import annotations

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.install import run_on_cpu
from tests.distributed.harness import run_on_ranks

shared = pytest.importorskip("benchmarks.gpu.shared")


def test_both_systems_train_on_the_same_batches_by_plans_that_were_searched_ahead() -> None:
    run = shared.Run(size="small", repeats=1, microbatches=4, search_ns=20_000_000)
    ranks = run_on_ranks(
        shared.work, 4, run, initialise=False, environment={"TORCHDYNAMO_DISABLE": "1"}
    )
    (text, images) = ranks[0]
    assert text[:2] == ("text", 0)
    assert images[:2] == ("images", 0)
    assert images[3] is None  # Megatron's function takes microbatches of one length
    assert all(one > 0 for one in (*text[2:], images[2], images[4]))


def test_a_search_inside_the_timed_iteration_is_refused() -> None:
    size = shared.SIZES["small"]
    case = shared.cases(size)["images"]
    profile = shared.load_device("cpu")
    ahead = shared.PlansAhead(shared.planner_for(case, profile, 1 << 30, 1_000_000))
    with run_on_cpu():
        data = shared.draw("images", size, 2, 0, case.options.params_dtype)
    batch = shared.describe_batch(data, case.describe)
    with pytest.raises(ConfigError, match="was not planned ahead"):
        ahead.collect(batch, forward_only=False)
    assert ahead.plan(batch) > 0
    assert ahead.collect(batch, forward_only=False).planned() is not None
    with pytest.raises(ConfigError, match="was not planned ahead"):  # each plan runs once
        ahead.collect(batch, forward_only=False)
