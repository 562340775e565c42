"""Patches of images of any size: their order, their places, and what keeps images apart."""

from __future__ import annotations

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.patches import PatchEmbedding, PatchRows, fold_patches
from megatron_pipeweaver.models.positions import positions_in_space

IMAGES = [torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(one)) for one in range(2)]


def test_patches_are_those_of_a_convolution_square_by_square() -> None:
    rows = PatchRows.of(IMAGES, 2, 2)
    embedding = PatchEmbedding(3, 5, 2)
    conv = torch.nn.Conv2d(3, 5, kernel_size=2, stride=2, bias=False)
    conv.load_state_dict(embedding.state_dict())
    found = embedding(IMAGES, rows)
    assert found.shape == (24, 2, 5)
    for number, image in enumerate(IMAGES):
        grid_HYX = conv(image)
        squares = grid_HYX.view(5, 2, 2, 3, 2).permute(1, 3, 2, 4, 0).reshape(24, 5)
        torch.testing.assert_close(found[:, number], squares)


def test_a_square_becomes_a_token_as_in_a_grid_of_one_size() -> None:
    grid = torch.arange(16.0).view(1, 4, 4)
    rows = PatchRows.of([grid, grid + 100], 1, 2)
    expected = fold_patches(torch.stack([grid.flatten(), grid.flatten() + 100], 1)[..., None], 4)
    assert torch.equal(rows.fold(rows.pixels([grid, grid + 100])), expected)


def test_patches_turn_by_their_row_and_their_column() -> None:
    rows = PatchRows(grids=((4, 2), (2, 4)), block=2)
    angles = rows.rotation(8)
    assert angles.shape == (8, 2, 1, 8)
    places = angles[:, :, 0, [0, 2]]  # the quickest pair of each turns by 1 a step
    assert places[:, 0].tolist() == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([2, 0], [2, 1], [3, 0], [3, 1]),
    ]
    assert places[:, 1].tolist() == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 2], [0, 3], [1, 2], [1, 3]),
    ]
    assert torch.equal(angles[..., :4], angles[..., 4:])


@pytest.mark.parametrize("fused", [False, True])
def test_images_attend_to_themselves_alone(fused: bool) -> None:
    cpu = torch.device("cpu")
    alike = PatchRows(grids=((4, 2), (2, 4)), block=2).attention(8, cpu, fused=fused)
    assert alike["attention_mask"] is None
    assert alike["packed_seq_params"] is None
    apart = PatchRows(grids=((2, 2), (2, 4)), block=2).attention(8, cpu, fused=fused)
    assert apart["rotary_pos_emb"].shape == (12, 1, 1, 8)
    if fused:
        assert apart["attention_mask"] is None
        assert apart["packed_seq_params"].cu_seqlens_q.tolist() == [0, 4, 12]
    else:
        assert apart["packed_seq_params"] is None
        mask = apart["attention_mask"][0, 0]
        assert not mask[:4, :4].any()
        assert not mask[4:, 4:].any()
        assert mask[:4, 4:].all()
        assert mask[4:, :4].all()


def test_an_image_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image 1 of a pass: 8 x 10 .* multiples of 4"):
        PatchRows.of([torch.zeros(3, 8, 8), torch.zeros(3, 8, 10)], 2, 2)


def test_text_goes_on_behind_the_largest_position_of_an_image() -> None:
    tokens = torch.tensor([1, 2, *[-200] * 6, 3, 4])
    assert positions_in_space(tokens, -200, [(2, 3)]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert positions_in_space(tokens[:2], -200, []).tolist() == [[0, 1]] * 3


def test_images_that_do_not_fill_their_places_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 images have 4 tokens and the document has 3 places"):
        positions_in_space(torch.tensor([1, -200, -200, -200]), -200, [(2, 2)])
