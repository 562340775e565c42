"""Several encoders, and text to video, on gloo ranks: bit by bit what one process computes."""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import Modulation
from tests.distributed.harness import run_on_ranks
from tests.distributed.test_training import train_and_compare
from tests.distributed.training import Case
from tests.unit.models import sounds, videos
from tests.unit.models.examples import cut

TWO_ENCODERS = Case(
    spec=sounds.vision_audio_language(),
    layout=cut(2, vision=(1, 1, 1, 0), audio=(1, 1), language=(2, 1, 1, 1)),
    options=sounds.TWO_ENCODERS,
    draw=sounds.random_mixes,
    split=True,
)
ONE_ENCODER_FROZEN = Case(
    spec=sounds.vision_audio_language(frozen=True),
    layout=cut(2, vision=(2, 1), audio=(0, 2), language=(3, 2)),
    options=sounds.TWO_ENCODERS,
    draw=sounds.random_mixes,
)
VIDEOS = Case(
    spec=videos.text_to_video(),
    layout=cut(2, text=(1, 1), video=(1, 1, 0, 1)),
    options=videos.OPTIONS,
    split=True,
    describe=videos.describe,
    draw=videos.random_clips,
)
VIDEOS_FROZEN_TEXT = Case(
    spec=videos.text_to_video(modulation=Modulation.LINEAR, frozen=True, projected=False),
    layout=cut(2, text=(2, 0), video=(2, 1)),
    options=videos.OPTIONS,
    images_per_pass=1,
    describe=videos.describe,
    draw=videos.random_clips,
    per_token_loss=True,
)


def test_other_modules_equal_one_process_bit_by_bit() -> None:
    cases = [TWO_ENCODERS, ONE_ENCODER_FROZEN, VIDEOS, VIDEOS_FROZEN_TEXT]
    compared = run_on_ranks(train_and_compare, 2, cases, 2, 3, deadline_s=200)
    assert all(len(one) == 12 and min(one) > 0 for one in compared)
