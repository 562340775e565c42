"""Positions of tokens that images stand among, in time, row and column (M-RoPE of Qwen2-VL).

two tokens of text, an image of 2 x 3 tokens, text:

time     0 1  2 2 2 2 2 2  5 6 ...
row      0 1  2 2 2 3 3 3  5 6 ...
column   0 1  2 3 4 2 3 4  5 6 ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError


def positions_in_space(
    tokens_S: Tensor, image_token: int, grids: Sequence[tuple[int, int]]
) -> Tensor:
    """Time, row and column of every token of one document, ``[3, S]``.

    Text goes on in all three at once, behind an image from its largest position on.

    Args:
        tokens_S: the document's.
        image_token: stands once for every token of an image.
        grids: rows and columns of the images' tokens, in their order.

    Raises:
        ConfigError: the images have not as many tokens as the document has places for.
    """
    places = (tokens_S == image_token).nonzero().flatten().tolist()
    count = sum(rows * columns for rows, columns in grids)
    if count != len(places):
        raise ConfigError(
            f"positions: {len(grids)} images have {count} tokens and the document has "
            f"{len(places)} places for them; repeat the image token once per token"
        )
    parts = []
    start = position = used = 0
    for rows, columns in grids:
        text = places[used] - start
        parts += [_in_order(text, position), _in_grid(rows, columns, position + text)]
        position += text + max(rows, columns)
        start += text + rows * columns
        used += rows * columns
    parts.append(_in_order(len(tokens_S) - start, position))
    return torch.cat(parts, 1)


def _in_order(count: int, first: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, -1)


def _in_grid(rows: int, columns: int, first: int) -> Tensor:
    row, column = torch.arange(rows), torch.arange(columns)
    return first + torch.stack(
        [
            torch.zeros(rows * columns, dtype=torch.int64),
            row.repeat_interleave(columns),
            column.repeat(rows),
        ]
    )
