"""What one layer is made of, read from a module's specification."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pipeweaver.ir.lmm import ModuleKind, ModuleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One transformer layer.

    `bias` is that of the output projection and the MLP, `qkv_bias` that of the query, key and
    value projection.
    """

    hidden_size: int
    ffn_hidden_size: int
    heads: int
    kv_groups: int
    head_size: int
    gated_mlp: bool = False
    rms_norm: bool = False
    bias: bool = True
    qkv_bias: bool = True
    causal: bool = False
    rotary: bool = False


_BIDIRECTIONAL = frozenset({ModuleKind.VISION, ModuleKind.DIFFUSION})


def layer_spec(module: ModuleSpec) -> LayerSpec:
    """The layer that `module` stacks.

    Language models with a gated MLP are of the Llama family: RMS norm, no bias; others are of the
    GPT family.
    """
    bidirectional = module.kind in _BIDIRECTIONAL
    llama = module.gated_mlp and not bidirectional
    return LayerSpec(
        hidden_size=module.hidden_size,
        ffn_hidden_size=module.ffn_hidden_size,
        heads=module.attention_heads,
        kv_groups=module.kv_groups,
        head_size=module.hidden_size // module.attention_heads,
        gated_mlp=module.gated_mlp,
        rms_norm=llama,
        bias=not llama,
        qkv_bias=not llama,
        causal=not bidirectional,
        rotary=llama,
    )
