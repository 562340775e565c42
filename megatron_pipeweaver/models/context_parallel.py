"""Context parallelism: which tokens of a sequence a rank has, and attention across the ranks.

    2 ranks       | 0 | 1 | 1 | 0 |      every rank has a front chunk and the back chunk to it,
    4 ranks   | 0 | 1 | 2 | 3 | 3 | 2 | 1 | 0 |      so that causal work is dealt evenly

That is Megatron's order (`get_batch_on_this_cp_rank`, `get_pos_emb_on_this_cp_rank`), which
Transformer Engine's attention relies on. Megatron's own attention refuses context parallelism;
`GatheringAttention` is that attention for a share of the queries.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, final

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SequenceShare:
    """A rank's tokens among those of its context-parallel `group`."""

    group: Any

    def rows(self, length: int, device: torch.device) -> Tensor:
        """The positions of this rank's tokens in a sequence of `length`, rising.

        Raises:
            ConfigError: the sequence cannot be dealt.
        """
        return self._dealt(length, device)[self.group.rank()].flatten()

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's tokens of `whole`, whose sequence runs along `dim`.

        Its gradient is zero where other ranks' tokens are.
        """
        return whole.index_select(dim, self.rows(whole.shape[dim], whole.device))

    def gather(self, share: Tensor, dim: int) -> Tensor:
        """The whole sequence of all ranks' shares, in order.

        The gradient of a share is the sum of what all ranks say of it.
        """
        parts = gather_from_sequence_parallel_region(
            share.movedim(dim, 0).contiguous(), group=self.group
        )
        order = self._dealt(parts.shape[0], parts.device).flatten()
        whole: Tensor = parts.index_select(0, order.argsort()).movedim(0, dim)
        return whole

    def _dealt(self, length: int, device: torch.device) -> Tensor:
        """The positions of every rank's tokens, [ranks, 2, length / (2 ranks)]."""
        ranks = self.group.size()
        if length % (2 * ranks):
            raise ConfigError(
                f"a sequence of {length} tokens on {ranks} context-parallel ranks: its length must "
                f"be a multiple of {2 * ranks}; pad it, or change --context-parallel-size"
            )
        chunks = torch.arange(length, device=device).view(2 * ranks, -1)
        return torch.stack([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)


@final
class GatheringAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's attention of this rank's queries to the keys and values of all ranks.

    They are gathered, and their gradients summed up and scattered again. The attention mask, where
    there is one, has a row per query of this rank and a column per token of the sequence.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **options: Any) -> None:
        if config.window_size is not None:
            raise ConfigError(
                f"--context-parallel-size {config.context_parallel_size} with --window-size: "
                "attention across ranks has no windows; leave one of them out"
            )
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # or the constructor refuses
        super().__init__(alone, layer_number, *args, **options)
        # "Causal" would be a mask by rows and columns, or a kernel of its own; rows are dealt.
        self.scale_mask_softmax.attn_mask_type = AttnMaskType.padding
        self._share = SequenceShare(self.pg_collection.cp)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """[S / ranks, B, heads, width] each, to [S / ranks, B, heads * width]; causal by default.

        Takes Megatron's arguments.
        """
        keys, values = self._share.gather(key, 0), self._share.gather(value, 0)
        if attention_mask is None:
            rows_S = self._share.rows(len(keys), query.device)
            columns_S = torch.arange(len(keys), device=query.device)
            attention_mask = (rows_S[:, None] < columns_S)[None, None]
        output: Tensor = super().forward(query, keys, values, attention_mask, *args, **options)
        return output
