"""Losses under `megatron.training.pretrain`: those of plain Megatron, and behind checkpoints."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import Jobs
from tests.distributed.jobs import IMAGES, LATENT_RUNS, LLAVA, SPARSE, TEXT
from tests.distributed.pretraining import close

pytestmark = pytest.mark.timeout(900)  # whoever asks first waits for all jobs


PLAIN = {
    **dict.fromkeys(IMAGES, "plain"),
    **dict.fromkeys(TEXT, "plain, text"),
    **dict.fromkeys([name for name in SPARSE if "plain" not in name], "plain, experts"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_losses_are_those_of_megatron_without_pipeweaver(jobs: Jobs, name: str) -> None:
    plain = jobs.heard[PLAIN[name]]
    assert list(plain.losses) == list(range(1, 21))
    assert len(plain.evaluated) == 3
    assert plain.losses[20] < plain.losses[1]
    close(jobs.heard[name], plain)
    assert jobs.heard[name].virtual_size is not None


def test_losses_of_latent_attention_are_those_of_one_pipeline_rank(jobs: Jobs) -> None:
    plain, cut = (jobs.heard[name] for name in LATENT_RUNS)
    assert list(plain.losses) == [1, 2, 3, 4]
    assert plain.losses[4] < plain.losses[1]
    close(cut, plain)


def test_segments_become_megatrons_virtual_pipeline_size(jobs: Jobs) -> None:
    assert jobs.heard["plain"].virtual_size is None
    assert jobs.heard["PP 4, on the host"].virtual_size == 2
    assert jobs.heard["PP 2 x DP 2, overlap"].virtual_size == 3


@pytest.mark.parametrize("kind", ["", ", text"])
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(jobs: Jobs, kind: str) -> None:
    unbroken = jobs.heard[f"PP 2 x DP 2, overlap{kind}"].losses
    rest = {iteration: unbroken[iteration] for iteration in range(11, 21)}
    assert jobs.heard[f"resumed{kind}"].losses == rest


def test_a_run_on_a_data_set_of_energon_goes_on_where_it_was_read(jobs: Jobs) -> None:
    unbroken = jobs.heard["energon"].losses
    assert list(unbroken) == list(range(1, 9))
    assert len(set(unbroken.values())) == 8
    rest = {iteration: unbroken[iteration] for iteration in range(4, 9)}
    assert jobs.heard["energon, resumed"].losses == rest


def test_a_run_with_experts_that_was_stopped_goes_on_as_if_it_was_not(jobs: Jobs) -> None:
    unbroken = jobs.heard["PP 2 x EP 2"].losses
    rest = {iteration: unbroken[iteration] for iteration in range(11, 21)}
    assert jobs.heard["resumed, EP 2"].losses == rest
    close(jobs.heard["resumed, EP 2, other segments"], jobs.heard["PP 2 x EP 2"], since=11)


@pytest.mark.parametrize(
    ("name", "since"), [("resumed, PP 4", 11), ("resumed, plain", 11), ("resumed, and back", 16)]
)
def test_a_run_goes_on_in_another_layout(jobs: Jobs, name: str, since: int) -> None:
    close(jobs.heard[name], jobs.heard["PP 2 x DP 2, overlap"], since=since)


@pytest.mark.parametrize("name", [one for one in LLAVA if "plain" not in one])
def test_a_script_with_a_whole_llava_model_has_the_same_losses_in_chunks(
    jobs: Jobs, name: str
) -> None:
    plain = jobs.heard[f"{name.partition(',')[0]}, plain"]
    assert list(plain.losses) == list(range(1, LLAVA[name].iterations + 1))
    close(jobs.heard[name], plain)
    assert jobs.heard[name].virtual_size is not None
