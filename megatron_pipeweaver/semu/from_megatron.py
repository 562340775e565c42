"""Modules from megatron-core's ``TransformerConfig``, without importing megatron.

A configuration says what layers are made of. What stands around them (vocabulary, patches,
projector, kind of positions) is told by megatron-core's model classes, so callers name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import (
    ExpertOptions,
    LatentOptions,
    LayerOptions,
    ModuleKind,
    ModuleSpec,
)


class LayerConfig(Protocol):
    """What is read of a ``TransformerConfig``; both supported versions have all of it."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int | None
    num_attention_heads: int
    num_query_groups: int | None
    kv_channels: int | None
    gated_linear_unit: bool
    normalization: str
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    num_moe_experts: int | None
    moe_router_topk: int
    moe_ffn_hidden_size: int | None
    moe_shared_expert_intermediate_size: int | None
    moe_layer_freq: int | list[int]


_RMS_NORM = {"LayerNorm": False, "RMSNorm": True}

# What would change a layer's costs and is not emulated, with the value that leaves it off. Not
# every version of megatron-core has all of these; one that is not there is off.
_NOT_EMULATED: Mapping[str, Any] = MappingProxyType(
    {
        "attention_output_gate": False,
        "experimental_attention_variant": None,
        "linear_attention_freq": None,
        "heterogeneous_block_specs": False,
        "moe_latent_size": None,
        "mtp_num_layers": None,
        "mla_down_proj_fusion": False,
    }
)


def module_from_config(
    config: LayerConfig, *, name: str, kind: ModuleKind, rotary: bool = False, **around: Any
) -> ModuleSpec:
    """The module whose layers `config` describes.

    Args:
        config: megatron-core's ``TransformerConfig``, or anything with its fields.
        name: of the module.
        kind: of the module; says whether attention is causal.
        rotary: whether layers turn queries and keys (``position_embedding_type`` of the model).
        around: further fields of `ModuleSpec` that are not about its layers (``vocab_size``,
            ``after``, ``patch_size``, ...), and ``positions`` for learned position embeddings.

    Raises:
        ConfigError: the configuration has a feature that is not emulated, or sizes do not fit.
    """
    for feature, off in _NOT_EMULATED.items():
        value = getattr(config, feature, off)
        if value != off:
            raise ConfigError(
                f"module {name!r}: {feature} is {value!r}, which is not emulated; use {off!r}"
            )
    if config.normalization not in _RMS_NORM:
        raise ConfigError(
            f"module {name!r}: normalization is {config.normalization!r}; "
            f"emulated are {list(_RMS_NORM)}"
        )
    ffn_hidden_size = config.ffn_hidden_size or 4 * config.hidden_size
    latent = _latent(config)
    return ModuleSpec(
        name=name,
        kind=kind,
        layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        attention_heads=config.num_attention_heads,
        kv_groups=(
            config.num_attention_heads
            if latent is not None
            else config.num_query_groups or config.num_attention_heads
        ),
        gated_mlp=config.gated_linear_unit,
        layer=LayerOptions(
            head_size=config.kv_channels if latent is None else None,
            rms_norm=_RMS_NORM[config.normalization],
            bias=config.add_bias_linear,
            qkv_bias=config.add_bias_linear or config.add_qkv_bias,
            rotary=rotary,
            qk_norm=config.qk_layernorm,
            latent=latent,
            **_windows(config, name, kind),
            experts=_experts(config, name, ffn_hidden_size),
            positions=around.pop("positions", 0),
        ),
        **around,
    )


def _latent(config: Any) -> LatentOptions | None:
    """What ``MLATransformerConfig`` has more; neither heads' own size nor groups count there."""
    if not getattr(config, "multi_latent_attention", False):
        return None
    return LatentOptions(
        kv_rank=config.kv_lora_rank,
        query_rank=config.q_lora_rank,
        head_size=config.qk_head_dim,
        rotary_size=config.qk_pos_emb_head_dim,
        value_size=config.v_head_dim,
    )


def _windows(config: Any, name: str, kind: ModuleKind) -> dict[str, Any]:
    """How far attention looks back, a query's own place included, and where it looks on.

    Raises:
        ConfigError: attention is not causal, or as `window_layers` has it.
    """
    given = getattr(config, "window_size", None)
    if given is not None and kind not in (ModuleKind.LANGUAGE, ModuleKind.TEXT):
        raise ConfigError(
            f"module {name!r}: window_size is {given!r} in a module of kind {kind.value!r}; "
            "emulated are windows (N, 0) of causal attention"
        )
    skip = getattr(config, "window_attn_skip_freq", None)
    return window_layers(given, skip, config.num_layers, name)


def window_layers(
    window: Sequence[int] | None, skip: int | Sequence[int] | None, layers: int, name: str
) -> dict[str, Any]:
    """How far causal attention looks back, and in which layers, as fields of `LayerOptions`.

    Args:
        window: Megatron's ``window_size``, keys before and behind a query; `None` for all before.
        skip: its ``window_attn_skip_freq``.
        layers: how many there are.
        name: of the module.

    Raises:
        ConfigError: the window does not end at the query, or the pattern is one of other layers.
    """
    if window is None:
        return {}
    back, ahead = window
    if back < 0 or ahead != 0:
        raise ConfigError(
            f"module {name!r}: window_size is {tuple(window)!r}; "
            "emulated are windows (N, 0) of causal attention"
        )
    if isinstance(skip, Sequence) and len(skip) != layers:
        raise ConfigError(
            f"module {name!r}: window_attn_skip_freq says {list(skip)}; give a 0 or a 1 for each "
            f"of {layers} layers"
        )
    if isinstance(skip, int):
        whole = [layer for layer in range(layers) if (layer + 1) % skip == 0]
    else:
        whole = [layer for layer in range(layers) if skip is not None and not skip[layer]]
    return {"window": back + 1, "full_attention_layers": tuple(whole)}


def _experts(config: LayerConfig, name: str, ffn_hidden_size: int) -> ExpertOptions | None:
    if config.num_moe_experts is None:
        return None
    return ExpertOptions(
        count=config.num_moe_experts,
        active=config.moe_router_topk,
        ffn_hidden_size=config.moe_ffn_hidden_size or ffn_hidden_size,
        shared_ffn_hidden_size=config.moe_shared_expert_intermediate_size,
        **expert_layers(config.moe_layer_freq, config.num_layers, name),
    )


def expert_layers(pattern: int | Sequence[int], layers: int, name: str) -> dict[str, Any]:
    """Which layers have experts, as fields of `ExpertOptions`.

    Args:
        pattern: Megatron's ``moe_layer_freq``.
        layers: how many there are.
        name: of the module.

    Raises:
        ConfigError: the pattern is one of other layers.
    """
    if isinstance(pattern, int):
        pattern = [int(layer % pattern == 0) for layer in range(layers)]
    if len(pattern) != layers or not set(pattern) <= {0, 1}:
        raise ConfigError(
            f"module {name!r}: moe_layer_freq says {list(pattern)}; give a 0 or a 1 for each of "
            f"{layers} layers"
        )
    dense = layers - sum(pattern)
    if list(pattern) == [0] * dense + [1] * (layers - dense):
        return {"dense_layers": dense}
    return {"only_layers": tuple(layer for layer, one in enumerate(pattern) if one)}
