"""The samples that `scripts/pretrain_vlm.py` trains on."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.positions import positions_in_space
from tests.unit.scripts.conftest import QUICKSTART, script_module

IMAGE, LENGTH = -200, 64


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return script_module("vlm_data", QUICKSTART.parent)


@pytest.fixture(scope="module")
def options(data: ModuleType) -> Any:
    return data.SampleOptions(
        seed=3,
        sequence_length=LENGTH,
        vocabulary=20,
        image_size=(8, 16),
        pixels_per_token=4,
        max_images=3,
        image_token=IMAGE,
    )


@pytest.mark.parametrize("mock", [False, True])
def test_images_of_one_size_stand_in_one_tensor(data: ModuleType, options: Any, mock: bool) -> None:
    made = data.Samples(replace(options, mock=mock)).microbatch(0, 12)
    places = int((made["tokens"] == IMAGE).sum())
    assert made["images"].shape == (places // 8, 3, 8, 16)
    assert places
    assert made["position_ids"].tolist() == [list(range(LENGTH))] * 12


def test_images_of_their_own_size_take_as_many_tokens(data: ModuleType, options: Any) -> None:
    samples = data.Samples(replace(options, dynamic=True, position_axes=3))
    grids = set()
    for number in range(80):
        made = samples.microbatch(number, 1)
        shown = [(one.shape[1] // 4, one.shape[2] // 4) for one in made["images"]]
        grids.update(shown)
        assert all(one.shape[0] == 3 for one in made["images"])
        expected = positions_in_space(made["tokens"][0], IMAGE, shown)
        assert torch.equal(made["position_ids"][:, 0], expected)
    assert grids == {(rows, columns) for rows in (1, 2) for columns in (1, 2, 3, 4)}


def test_nobody_predicts_an_image(data: ModuleType, options: Any) -> None:
    made = data.Samples(options).microbatch(0, 8)
    predicted = made["labels"][:, :-1]
    following = made["tokens"][:, 1:]
    counted = made["loss_mask"][:, :-1].bool()
    assert torch.equal(counted, following != IMAGE)
    assert torch.equal(predicted[counted], following[counted])


def test_more_images_than_a_sequence_holds_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="--max-images 8: take 72 tokens"):
        replace(options, max_images=8)
