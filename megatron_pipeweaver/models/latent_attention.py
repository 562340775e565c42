"""Multi-head latent attention of megatron-core's own parts, where there is no Transformer Engine.

Megatron's latent attention hands the widths of keys and values to its core attention, and its own
core attention takes neither: without Transformer Engine it cannot be built. What is missing stands
here; the rest, projections and rotary positions, is Megatron's code as it is.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, final

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


@final
class LatentCore(DotProductAttention):  # type: ignore[misc]
    """Megatron's own attention, with values of another width than queries and keys.

    Takes Megatron's arguments.
    """

    def __init__(
        self,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        # Left out by Megatron's base class of all attention, which builds a core in vain.
        del k_channels, v_channels
        values = copy.copy(config)
        values.kv_channels = config.v_head_dim
        super().__init__(values, *args, **options)

    def forward(self, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        """[S, B, heads, width] each, to [S, B, heads * width of values]."""
        if key.requires_grad:
            key.register_hook(self._summed_up)  # type: ignore[no-untyped-call]
        output: Tensor = super().forward(query, key, *args, **options)
        return output

    def _summed_up(self, grad_SBAD: Tensor) -> Tensor:
        """The gradient of keys, in which the channels that all heads share stand summed up.

        Autograd sums them over this rank's heads, and Megatron over no other's: all of the sum is
        given to the first head. It is the same to the last bit whether keys came through a
        checkpoint or not only if gradients lie in memory as they do behind one.
        """
        grad_SBAD = grad_SBAD.contiguous()
        if self.tp_group.size() == 1:
            return grad_SBAD
        width = self.config.qk_head_dim
        own, shared = grad_SBAD[..., :width], grad_SBAD[..., width:]
        total_SB1D = shared.sum(dim=2, keepdim=True)
        torch.distributed.all_reduce(total_SB1D, group=self.tp_group)
        others = torch.zeros_like(shared[:, :, 1:])
        return torch.cat([own, torch.cat([total_SB1D, others], dim=2)], dim=-1)


@final
class OwnLatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Megatron's latent attention of just the parts that its specification names.

    Newer versions choose linears and norms again by what Transformer Engine has, and want its
    norm of queries where these have no latent.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = (
            "linear_q_proj",
            "linear_q_up_proj",
            "linear_kv_up_proj",
            "q_layernorm",
            "kv_layernorm",
        )
        return {name: getattr(submodules, name) for name in names}


def own_latent_attention(attention: Any) -> Any:
    """Megatron's specification of `attention` without Transformer Engine, such that it runs."""
    parts = replace(attention.submodules, core_attention=LatentCore)
    return replace(attention, module=OwnLatentAttention, submodules=parts)
