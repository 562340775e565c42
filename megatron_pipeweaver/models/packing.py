"""Sequences of their own lengths in one row: prompts of a text encoder, clips of a diffusion model.

Attention stays within the sequences: a fused kernel is told where they begin, Megatron's own
attention gets a mask.

    clips of 3 and 2 patches:   a a a b b      a | . . . x x
                                               b | x x x . .     x: masked out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a packed row, with the lengths where no device has to be asked."""

    lengths: tuple[int, ...] = ()


def packed_sequences(
    lengths: Sequence[int], device: torch.device, other_lengths: Sequence[int] | None = None
) -> PackedSequences:
    """Sequences of `lengths` whose queries read keys of `other_lengths`, their own by default."""
    keys = lengths if other_lengths is None else other_lengths
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=_starts(lengths, device),
        cu_seqlens_kv=_starts(keys, device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(keys),
        lengths=tuple(lengths),
    )


def block_mask(rows: Sequence[int], columns: Sequence[int], device: torch.device) -> Tensor | None:
    """True where a query of one sequence meets a key of another, [1, 1, sum(rows), sum(columns)].

    `None` where there is one sequence, which masks nothing out.
    """
    if len(rows) < 2:
        return None
    owner_of_row, owner_of_column = _owners(rows, device), _owners(columns, device)
    return (owner_of_row[:, None] != owner_of_column[None, :])[None, None]


def causal_block_mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """As `block_mask`, and true for every key behind its query as well."""
    mask = block_mask(lengths, lengths, device)
    if mask is None:
        return None
    return mask | torch.ones_like(mask).triu(1)


def positions_within(lengths: Sequence[int], device: torch.device) -> Tensor:
    """0, 1, 2, ... for each sequence, one behind the other, [sum(lengths)]."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


def items_in_a_row(features: Sequence[Tensor]) -> Tensor:
    """Passes' outputs [tokens, items, H] as one row of items, one behind the other, [tokens, H]."""
    return torch.cat([one.transpose(0, 1).reshape(-1, one.shape[-1]) for one in features])


def _starts(lengths: Sequence[int], device: torch.device) -> Any:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _owners(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(device)
