"""Patches of images: those of a ViT of learned positions, and those of one that turns by place.

The latter (Qwen2-VL) takes images of any size. In a pass, their patches stand image beside image
where all have as many, else in one row, and attend to their own image alone:

    4 and 4 patches:  a a a a      4 and 6 patches:  a a a a b b b b b b
                      b b b b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.packing import block_mask, packed_sequences

Grid = tuple[int, int]
"""Rows and columns."""
_BASE = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRows:
    """The patches of one pass's images, in the order in which they travel.

    Patches that become one token stand together: those of a square of `block` by `block`, row by
    row, and square by square, row by row. `grids` are the images' rows and columns of patches.
    """

    grids: tuple[Grid, ...]
    block: int

    @classmethod
    def of(cls, images: Sequence[Tensor], patch_size: int, block: int) -> PatchRows:
        """Those of `images` [C, Y, X]; `ConfigError` where one cannot be cut into squares."""
        side = patch_size * block
        for number, image in enumerate(images):
            height, width = image.shape[-2:]
            if height % side or width % side or not height * width:
                raise ConfigError(
                    f"image {number} of a pass: {height} x {width} pixels cannot be cut into "
                    f"squares of {side}; resize images to multiples of {side}"
                )
        sizes = (image.shape[-2:] for image in images)
        return cls(
            grids=tuple((height // patch_size, width // patch_size) for height, width in sizes),
            block=block,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each image."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def side_by_side(self) -> bool:
        """Whether all images have as many patches."""
        return len(set(self.lengths)) == 1

    def arrange(self, images: Sequence[Tensor]) -> Tensor:
        """What each image has per patch, [patches, ...], as one tensor [S, B, ...]."""
        if self.side_by_side:
            return torch.stack(tuple(images), 1)
        return torch.cat(tuple(images)).unsqueeze(1)

    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """The patches of `images` [C, Y, X], channel by channel: [S, B, C * pixels]."""
        return self.arrange([self._pixels(*one) for one in zip(images, self.grids, strict=True)])

    def _pixels(self, image_CYX: Tensor, grid: Grid) -> Tensor:
        channels, height, width = image_CYX.shape
        rows, columns = (one // self.block for one in grid)
        patch = height // grid[0], width // grid[1]
        cut_up = image_CYX.view(channels, rows, self.block, patch[0], columns, self.block, patch[1])
        return cut_up.permute(1, 4, 2, 5, 0, 3, 6).reshape(grid[0] * grid[1], -1)

    def rotation(self, head_size: int) -> Tensor:
        """The angles by which the channels of a head turn.

        Returns:
            fp32 ``[S, B, 1, head_size]``: a quarter of the channels by a patch's row, a quarter
            by its column, and both again.
        """
        pairs = head_size // 4
        speeds = 1.0 / _BASE ** (torch.arange(pairs, dtype=torch.float32) / pairs)
        made = {grid: self._angles(grid, speeds) for grid in set(self.grids)}
        return self.arrange([made[grid] for grid in self.grids]).unsqueeze(2)

    def _angles(self, grid: Grid, speeds: Tensor) -> Tensor:
        """[patches, 4 * speeds]."""
        rows, columns = (torch.arange(one, dtype=torch.float32) for one in grid)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # as a two-channel image
        half = (self._pixels(places, grid).unsqueeze(-1) * speeds).flatten(1)
        return torch.cat([half, half], -1)

    def attention(self, head_size: int, device: torch.device, *, fused: bool) -> dict[str, Any]:
        """What Megatron's layers must know of the patches, by the name of their argument.

        Args:
            head_size: channels of a head.
            device: where the layers are.
            fused: whether their kernel takes the images' borders; else it takes a mask.
        """
        mask = packed = None
        if not self.side_by_side and fused:
            packed = packed_sequences(self.lengths, device)
        elif not self.side_by_side:
            mask = block_mask(self.lengths, self.lengths, device)
        return {
            "attention_mask": mask,
            "packed_seq_params": packed,
            "rotary_pos_emb": self.rotation(head_size).to(device),
        }

    def fold(self, hidden_SBH: Tensor) -> Tensor:
        """Squares of patches side by side in one token, ``[S / block**2, B, block**2 * H]``."""
        count = self.block**2
        size_S, size_B, size_H = hidden_SBH.shape
        squares = hidden_SBH.view(size_S // count, count, size_B, size_H)
        return squares.transpose(1, 2).reshape(size_S // count, size_B, count * size_H)


class PatchEmbedding(torch.nn.Conv2d):
    """Embeds the patches of images of any size; its parameters are those of a convolution.

    Args:
        channels: of a patch. It may span several frames, each of them an image's channels; an
            image stands still in all of them.
        hidden_size: of an embedding.
        patch_size: height and width of a patch.
    """

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__(
            channels, hidden_size, kernel_size=patch_size, stride=patch_size, bias=False
        )

    def forward(self, images: Sequence[Tensor], rows: PatchRows) -> Tensor:  # type: ignore[override]
        """Images [C, Y, X], on any device, whose patches stand as `rows` says, to [S, B, H]."""
        size_H, _, *patch = self.weight.shape
        still_HCYX = self.weight.view(size_H, images[0].shape[0], -1, *patch).sum(2)
        pixels = rows.pixels([one.to(still_HCYX) for one in images])
        return functional.linear(pixels, still_HCYX.flatten(1))


def fold_patches(hidden_SBH: Tensor, patches_per_token: int) -> Tensor:
    """Square blocks of neighbouring patches side by side in one token.

    Args:
        hidden_SBH: a square grid of patches for each image, row by row.
        patches_per_token: patches of a block, a square number; both sides of the grid are
            multiples of the block's.

    Returns:
        The blocks row by row, ``[S / patches_per_token, B, patches_per_token * H]``; inside a
        token, its patches row by row.
    """
    size_S, size_B, size_H = hidden_SBH.shape
    side, block = math.isqrt(size_S), math.isqrt(patches_per_token)
    grid = hidden_SBH.view(side // block, block, side // block, block, size_B, size_H)
    blocks = grid.permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(size_S // patches_per_token, size_B, patches_per_token * size_H)
