"""A layer of a diffusion transformer, made of megatron-core's attention and MLP.

    patches -> norm, modulate -> self-attention -> gate -> +
            -> norm -> cross-attention to the prompts -> +
            -> norm, modulate -> MLP -> gate -> +

Shift, scale and gate follow from the time embedding of each clip (DiT, arXiv 2212.09748): through
a linear of every layer, or one that all layers share beside a table of each (PixArt, Wan2.1).

Shapes: S patches of all clips, one clip behind the other; N clips; B is 1; H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TERowParallelLinear,
)
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec as LayerModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional

from megatron_pipeweaver.ir.lmm import MODULATIONS, Modulation, ModuleSpec
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.packing import PackedSequences, packed_sequences
from megatron_pipeweaver.models.specs import uses_transformer_engine
from megatron_pipeweaver.models.strategy import StrategyLayer


class PlainNorm(torch.nn.LayerNorm):
    """A layer norm without weights: modulation takes their place."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        del config
        super().__init__(hidden_size, eps, elementwise_affine=False)


class HeadNorm(torch.nn.RMSNorm):
    """RMS norm of one head's queries or keys, whatever norm the layers have."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        del config
        super().__init__(hidden_size, eps)


class ModulatedLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's transformer layer with modulated norms, gates, and cross-attention to prompts.

    Args:
        config: megatron-core's.
        submodules: megatron-core's.
        modulation: where shifts, scales and gates come from.
        more: what megatron-core hands to its layers.
    """

    def __init__(
        self, config: Any, submodules: Any, *, modulation: Modulation, **more: Any
    ) -> None:
        super().__init__(config=config, submodules=submodules, **more)
        self._time_tokens = modulation.time_tokens
        size = config.hidden_size
        self.modulation: torch.nn.Parameter | torch.nn.Linear
        if modulation is Modulation.TABLE:
            table = torch.nn.Parameter(torch.empty(MODULATIONS, size, dtype=config.params_dtype))
            config.init_method(table.data)
            self.modulation = table
        else:
            self.modulation = torch.nn.Linear(size, MODULATIONS * size)
            config.init_method(self.modulation.weight.data)
        core = self.self_attention.core_attention
        self._fused = not isinstance(core, DotProductAttention)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            hidden_states: the clips' patches [S, 1, H].
            attention_mask: true where patches of different clips meet; `None` for one clip.
            context: the time vectors of all clips, then the prompts' features, [N * k + T, 1, H].
            context_mask: true where a clip meets the prompt of another one.
            packed_seq_params: which patches are whose, and which prompts.

        Returns:
            The patches, and `context` as it came.
        """
        assert context is not None
        assert packed_seq_params is not None
        clips = packed_seq_params
        time_rows = len(clips.lengths) * self._time_tokens
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self._vectors(context[:time_rows])

        normed = modulated(self.input_layernorm(hidden_states), shift, scale, clips.lengths)
        branch = with_bias(
            self.self_attention(
                normed,
                attention_mask=attention_mask,
                packed_seq_params=self._within(clips, normed.device),
            )
        )
        hidden_SBH = hidden_states + self._dropped(gated(branch, gate, clips.lengths))

        prompts = context[time_rows:]
        if len(prompts):
            attended = self.cross_attention(
                self.pre_cross_attn_layernorm(hidden_SBH),
                attention_mask=context_mask,
                key_value_states=prompts,
                packed_seq_params=clips if self._fused else None,
            )
            hidden_SBH = hidden_SBH + self._dropped(with_bias(attended))

        normed = modulated(self.pre_mlp_layernorm(hidden_SBH), mlp_shift, mlp_scale, clips.lengths)
        branch = with_bias(self.mlp(normed))
        return hidden_SBH + self._dropped(gated(branch, mlp_gate, clips.lengths)), context

    def _vectors(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate for attention and for the MLP, [N, H] each."""
        time_NKH = time.view(-1, self._time_tokens, time.shape[-1])
        if isinstance(self.modulation, torch.nn.Parameter):
            vectors_NKH = time_NKH[:, 1:] + self.modulation
        else:
            mixed = self.modulation(functional.silu(time_NKH[:, 0]))
            vectors_NKH = mixed.view(len(time_NKH), MODULATIONS, -1)
        return vectors_NKH.unbind(1)

    def _within(self, clips: PackedSequences, device: torch.device) -> PackedSequences | None:
        """For self-attention in a fused kernel: clips that read themselves."""
        return packed_sequences(clips.lengths, device) if self._fused else None

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.hidden_dropout:
            return branch
        return functional.dropout(branch, self.hidden_dropout, self.training)


class DiffusionLayer(StrategyLayer, ModulatedLayer):  # type: ignore[misc]
    """A modulated layer under run-time memory strategies."""


def modulated(normed: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int]) -> Tensor:
    """``normed * (1 + scale) + shift``, each clip [length, 1, H] by its own row of both [N, H]."""
    factor = 1 + scale
    return _by_clip(
        normed, lengths, lambda clip, index: torch.addcmul(shift[index], clip, factor[index])
    )


def gated(branch: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """``branch * gate``, each clip [length, 1, H] by its own row of `gate` [N, H]."""
    return _by_clip(branch, lengths, lambda clip, index: clip * gate[index])


def _by_clip(
    rows: Tensor, lengths: Sequence[int], apply: Callable[[Tensor, int], Tensor]
) -> Tensor:
    # Clip by clip, since vectors repeated for every patch would be kept for the backward.
    if len(lengths) == 1:
        return apply(rows, 0)
    clips = torch.split(rows, list(lengths))
    return torch.cat([apply(clip, index) for index, clip in enumerate(clips)])


def with_bias(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """What Megatron's attention and MLP return: the output, and a bias that is to be added."""
    branch, bias = output
    return branch if bias is None else branch + bias


def diffusion_layer_spec(module: ModuleSpec, options: ModelOptions) -> Any:
    """A diffusion layer of Transformer Engine's parts where it is used, else of megatron-core's."""
    column, row, core = ColumnParallelLinear, RowParallelLinear, DotProductAttention
    if uses_transformer_engine(options):
        column, row, core = TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention
    base = get_vit_layer_with_local_spec()
    head_norm = HeadNorm if module.layer.qk_norm else None
    submodules = replace(
        base.submodules,
        input_layernorm=PlainNorm,
        self_attention=LayerModule(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.no_mask},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=core,
                linear_proj=row,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        pre_cross_attn_layernorm=WrappedTorchNorm,
        cross_attention=LayerModule(
            module=CrossAttention,
            params={"attn_mask_type": AttnMaskType.no_mask},
            submodules=CrossAttentionSubmodules(
                linear_q=column, linear_kv=column, core_attention=core, linear_proj=row
            ),
        ),
        pre_mlp_layernorm=PlainNorm,
        mlp=_mlp(base.submodules.mlp, MLPSubmodules(linear_fc1=column, linear_fc2=row)),
    )
    return LayerModule(
        module=DiffusionLayer,
        params={"modulation": module.layer.modulation},
        submodules=submodules,
    )


def _mlp(spec: Any, linears: MLPSubmodules) -> Any:
    """megatron-core's MLP of `linears`, in the form that this version of it has them in."""
    if isinstance(spec, LayerModule):
        return replace(spec, submodules=linears)
    return partial(spec, submodules=linears)
