"""Qwen2-VL under `megatron.training.pretrain`: imported, or from flags and random weights."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Jobs
from tests.distributed.jobs import QWEN
from tests.distributed.pretraining import MICROBATCHES, close, load_script

pytestmark = pytest.mark.timeout(900)  # whoever asks first waits for all jobs


def loss_of_transformers(jobs: Jobs) -> float:
    """The loss that `transformers` has of the first batch, with the checkpoint's weights."""
    from transformers import Qwen2VLForConditionalGeneration

    from tests.unit.models.checkpoints import IMAGE, qwen2_vl_logits

    script = load_script()
    options = script.SampleOptions(
        seed=1234,  # Megatron's own
        sequence_length=48,
        vocabulary=63,
        image_size=(16, 24),
        pixels_per_token=8,
        max_images=QWEN["qwen, plain"].images,
        image_token=-200,
        dynamic=True,
        position_axes=3,
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(jobs.directory / "qwen2_vl")
    total, count, shapes = 0.0, 0.0, set()
    for number in range(MICROBATCHES):
        batch = script.Samples(options).microbatch(number, 1)
        tokens = batch["tokens"].masked_fill(batch["tokens"] == -200, IMAGE)
        logits, positions = qwen2_vl_logits(model, tokens, batch["images"])
        assert torch.equal(batch["position_ids"], positions)
        losses = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="none")
        total += float((losses * batch["loss_mask"][0]).sum())
        count += float(batch["loss_mask"].sum())
        shapes.update(one.shape for one in batch["images"])
    assert len(shapes) > 2
    return total / count


@pytest.mark.parametrize("name", ["qwen, plain", "qwen, PP 2"])
def test_training_begins_with_the_loss_of_transformers(jobs: Jobs, name: str) -> None:
    found = jobs.heard[name].losses
    assert list(found) == [1, 2, 3, 4]
    assert found[1] == pytest.approx(loss_of_transformers(jobs), rel=1e-4)
    assert found[4] < found[1]


def test_losses_do_not_depend_on_the_layout(jobs: Jobs) -> None:
    close(jobs.heard["qwen, PP 2"], jobs.heard["qwen, plain"])
    close(jobs.heard["qwen-like, PP 4"], jobs.heard["qwen-like, plain"])


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(jobs: Jobs) -> None:
    unbroken = jobs.heard["qwen, PP 2"].losses
    assert jobs.heard["qwen, resumed"].losses == {at: unbroken[at] for at in (3, 4)}
