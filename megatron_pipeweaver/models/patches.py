"""Patches of an image: their places in a grid, and squares of them as one token."""

from __future__ import annotations

import math

import torch
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_pipeweaver.models.chunk import ChunkSetting
from megatron_pipeweaver.models.specs import vision_layer_spec

_BASE = 10_000.0


class RotaryViTModel(MegatronModule):  # type: ignore[misc]
    """The first chunk of a ViT without learned positions: patches, then layers (Qwen2-VL).

    Half of a head's pairs turn by the row of a patch, half by its column.

    Attributes:
        conv1: makes patches of images, named as in Megatron's CLIP.
        decoder: the chunk's layers.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(config=setting.config)
        module = setting.module
        assert module.patch_size is not None  # VisionChunk has checked it
        self._grid = setting.options.encoder(module.name).image_size // module.patch_size
        self.conv1 = torch.nn.Conv2d(
            module.image_channels,
            module.hidden_size,
            kernel_size=module.patch_size,
            stride=module.patch_size,
            bias=False,
        )
        self.decoder = TransformerBlock(
            setting.config,
            vision_layer_spec(setting.options),
            pre_process=True,
            post_process=setting.place.is_last,
            pg_collection=setting.groups,
            vp_stage=setting.place.segment,
        )

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """Images to the hidden states of their patches, row by row, [B, S, H]."""
        patches_SBH = self.conv1(images_BCYX).flatten(2).permute(2, 0, 1).contiguous()
        rotation = patch_rotation(self._grid, self.decoder.config.kv_channels)
        output: Tensor = self.decoder(
            patches_SBH, None, rotary_pos_emb=rotation.to(patches_SBH.device)
        )
        return output.permute(1, 0, 2)


def patch_rotation(grid: int, head_size: int) -> Tensor:
    """The angles by which the channels of a head turn, for every patch of a square grid.

    Returns:
        fp32 ``[grid * grid, 1, 1, head_size]``, patches row by row: a quarter of the channels by
        row, a quarter by column, and both again.
    """
    pairs = head_size // 4
    speeds = 1.0 / _BASE ** (torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = torch.outer(torch.arange(grid, dtype=torch.float32), speeds)
    rows = angles[:, None, :].expand(grid, grid, pairs)
    columns = angles[None, :, :].expand(grid, grid, pairs)
    half = torch.cat([rows, columns], -1).reshape(grid * grid, 1, 1, 2 * pairs)
    return torch.cat([half, half], -1)


def fold_patches(hidden_SBH: Tensor, patches_per_token: int) -> Tensor:
    """Square blocks of neighbouring patches side by side in one token.

    Args:
        hidden_SBH: a square grid of patches for each image, row by row.
        patches_per_token: patches of a block, a square number; both sides of the grid are
            multiples of the block's.

    Returns:
        The blocks row by row, ``[S / patches_per_token, B, patches_per_token * H]``; inside a
        token, its patches row by row (Qwen2-VL's patch merger).
    """
    size_S, size_B, size_H = hidden_SBH.shape
    side, block = math.isqrt(size_S), math.isqrt(patches_per_token)
    grid = hidden_SBH.view(side // block, block, side // block, block, size_B, size_H)
    blocks = grid.permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(size_S // patches_per_token, size_B, patches_per_token * size_H)
