"""Layer specifications: Transformer Engine's layers where it is used, megatron-core's elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkPlace
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.models.context_parallel import GatheringAttention
from megatron_pipeweaver.models.latent_attention import own_latent_attention
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.strategy import StrategyLayer


def uses_transformer_engine(options: ModelOptions) -> bool:
    """Whether layers are Transformer Engine's.

    Raises:
        ConfigError: they are asked for and Transformer Engine cannot be imported.
    """
    if options.transformer_engine is None:
        return bool(HAVE_TE) and torch.cuda.is_available()
    if options.transformer_engine and not HAVE_TE:
        raise ConfigError(
            "model options: transformer_engine is on and Transformer Engine cannot be imported; "
            "install it, or leave the option out"
        )
    return options.transformer_engine


def language_block_spec(
    module: ModuleSpec, place: ChunkPlace, config: Any, options: ModelOptions
) -> Any:
    """The decoder layers of one chunk, one by one: some may have experts and others not.

    Args:
        module: the language model.
        place: which of its layers the chunk has.
        config: the chunk's `TransformerConfig`.
        options: how chunks are made.
    """
    experts, latent = module.layer.experts, module.layer.latent is not None
    own = range(place.first_layer, place.first_layer + place.layers)
    return TransformerBlockSubmodules(
        layer_specs=[
            language_layer_spec(
                options,
                config.context_parallel_size,
                experts.count if experts is not None and experts.holds(layer) else None,
                grouped=config.moe_grouped_gemm,
                latent=latent,
                qk_norm=module.layer.qk_norm,
            )
            for layer in own
        ],
        layer_norm=LayerNormImpl,
    )


def language_layer_spec(
    options: ModelOptions,
    context_parallel_size: int = 1,
    experts: int | None = None,
    *,
    grouped: bool = False,
    latent: bool = False,
    qk_norm: bool = False,
) -> Any:
    """A decoder layer with causal attention, under run-time memory strategies.

    Args:
        options: how chunks are made.
        context_parallel_size: among how many ranks a sequence is divided.
        experts: how many stand in the place of the MLP, if any.
        grouped: whether Transformer Engine runs all experts of a rank as one.
        latent: whether attention is latent.
        qk_norm: whether queries and keys, or the latents that they come from, are normed.
    """
    parts = {
        "num_experts": experts,
        "moe_grouped_gemm": grouped,
        "multi_latent_attention": latent,
        "qk_layernorm": qk_norm,
    }
    if uses_transformer_engine(options):
        return replace(get_gpt_layer_with_transformer_engine_spec(**parts), module=StrategyLayer)
    spec = copy.deepcopy(get_gpt_layer_local_spec(**parts))
    if latent:
        spec.submodules.self_attention = own_latent_attention(spec.submodules.self_attention)
    if context_parallel_size > 1:
        spec.submodules.self_attention.submodules.core_attention = GatheringAttention
    return replace(spec, module=StrategyLayer)


def vision_layer_spec(options: ModelOptions) -> Any:
    """A ViT layer in which every patch attends to every other, under run-time strategies."""
    if uses_transformer_engine(options):
        return replace(get_vit_layer_with_transformer_engine_spec(), module=StrategyLayer)
    spec = copy.deepcopy(get_vit_layer_with_local_spec())
    # megatron-core 0.16.1 asks for a causal mask here, which later versions mend.
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return replace(spec, module=StrategyLayer)
