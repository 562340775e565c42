"""What one layer is made of, read from a module's specification."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pipeweaver.ir.lmm import (
    ExpertOptions,
    LatentOptions,
    Modulation,
    ModuleKind,
    ModuleSpec,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One transformer layer.

    `head_size` is the width of a head's query and key; values have it too, but those of `latent`
    attention. `bias` is that of the output projection and the MLP, `qkv_bias` that of the query,
    key and value projection. `window` bounds self-attention; `context_size` is the width that
    cross-attention reads, `None` where there is none; `self_attention` is off where
    cross-attention takes its place.
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
    qk_norm: bool = False
    window: int | None = None
    latent: LatentOptions | None = None
    experts: ExpertOptions | None = None
    context_size: int | None = None
    self_attention: bool = True
    modulation: Modulation | None = None

    @property
    def value_size(self) -> int:
        """The width of a head's value, and of what it hands on."""
        return self.head_size if self.latent is None else self.latent.value_size


_BIDIRECTIONAL = frozenset({ModuleKind.VISION, ModuleKind.DIFFUSION})


def _usual(given: bool | None, usual: bool) -> bool:
    return usual if given is None else given


def _head_size(module: ModuleSpec) -> int:
    latent = module.layer.latent
    if latent is not None:
        return latent.head_size + latent.rotary_size
    return module.layer.head_size or module.hidden_size // module.attention_heads


def layer_spec(module: ModuleSpec, index: int = 0) -> LayerSpec:
    """Layer `index` of `module`.

    Language models with a gated MLP are of the Llama family unless told otherwise: RMS norm,
    rotary positions, no bias; others are of the GPT family.
    """
    options = module.layer
    bidirectional = module.kind in _BIDIRECTIONAL
    llama = module.gated_mlp and not bidirectional
    windowed = options.window is not None and index not in options.full_attention_layers
    experts = options.experts
    crosses = not options.cross_attention_layers or index in options.cross_attention_layers
    return LayerSpec(
        hidden_size=module.hidden_size,
        ffn_hidden_size=module.ffn_hidden_size,
        heads=module.attention_heads,
        kv_groups=module.kv_groups,
        head_size=_head_size(module),
        gated_mlp=module.gated_mlp,
        rms_norm=_usual(options.rms_norm, llama),
        bias=_usual(options.bias, not llama),
        qkv_bias=_usual(options.qkv_bias, _usual(options.bias, not llama)),
        causal=not bidirectional,
        rotary=_usual(options.rotary, llama),
        qk_norm=options.qk_norm,
        window=options.window if windowed else None,
        latent=options.latent,
        experts=experts if experts is not None and experts.holds(index) else None,
        context_size=options.context_size if crosses else None,
        self_attention=not (
            options.cross_attention_alone and crosses and options.context_size is not None
        ),
        modulation=options.modulation,
    )


def layer_groups(module: ModuleSpec, first: int, count: int) -> tuple[tuple[LayerSpec, int], ...]:
    """Layers ``first`` to ``first + count`` as runs of equal ones: specification and length."""
    groups: list[tuple[LayerSpec, int]] = []
    for index in range(first, first + count):
        spec = layer_spec(module, index)
        if groups and groups[-1][0] == spec:
            groups[-1] = (spec, groups[-1][1] + 1)
        else:
            groups.append((spec, 1))
    return tuple(groups)
