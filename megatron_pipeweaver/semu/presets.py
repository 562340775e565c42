"""Modules and setups by name: the paper's (section 7) and well-known open models.

Sizes are those of the models' published configurations; tests hold the parameter counts to the
published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import (
    ExpertOptions,
    LatentOptions,
    LayerOptions,
    ModelSpec,
    Modulation,
    ModuleKind,
    ModuleSpec,
)


def _module(kind: ModuleKind, sizes: str, **more: Any) -> ModuleSpec:
    layers, hidden, ffn, heads, groups = (int(size) for size in sizes.split())
    return ModuleSpec(
        name=kind.value,
        kind=kind,
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        attention_heads=heads,
        kv_groups=groups,
        **more,
    )


def _vit(sizes: str, **more: Any) -> ModuleSpec:
    return _module(ModuleKind.VISION, sizes, **{"patch_size": 14, **more})


def _lm(sizes: str, vocabulary: int, **more: Any) -> ModuleSpec:
    return _module(
        ModuleKind.LANGUAGE, sizes, **{"gated_mlp": True, "vocab_size": vocabulary, **more}
    )


def _dit(sizes: str, text: int, **more: Any) -> ModuleSpec:
    """Prompts' features come in the width `text`; cross-attention reads the layers' own."""
    hidden = int(sizes.split()[1])
    return _module(
        ModuleKind.DIFFUSION,
        sizes,
        **{
            "patch_size": 2,
            "image_channels": 16,
            "input_size": text,
            "layer": LayerOptions(context_size=hidden, modulation=Modulation.TABLE, qk_norm=True),
            **more,
        },
    )


def _latent_lm(
    sizes: str, vocabulary: int, experts: ExpertOptions, query_rank: int | None = None
) -> ModuleSpec:
    """Of DeepSeek's kind: latents of one width, experts behind the first layers."""
    heads = sizes.rsplit(maxsplit=1)[-1]
    latent = LatentOptions(
        kv_rank=512, query_rank=query_rank, head_size=128, rotary_size=64, value_size=128
    )
    return _lm(
        f"{sizes} {heads}",
        vocabulary,
        layer=LayerOptions(latent=latent, qk_norm=True, experts=experts),
    )


_V2_EXPERTS = ExpertOptions(
    count=64, active=6, ffn_hidden_size=1408, shared_ffn_hidden_size=2 * 1408, dense_layers=1
)
_QWEN2 = LayerOptions(qkv_bias=True)
_QWEN3 = LayerOptions(head_size=128, qk_norm=True)
_QWEN_VIT = LayerOptions(
    rms_norm=True, rotary=True, window=64, full_attention_layers=(7, 15, 23, 31)
)
_QWEN_MERGER: Mapping[str, Any] = MappingProxyType(
    {
        # Two frames to a patch, 2 x 2 patches to a token.
        "image_channels": 6,
        "patches_per_token": 4,
        "projector_hidden_size": 5120,
        "output_size": 3584,
    }
)

MODULES: Mapping[str, ModuleSpec] = MappingProxyType(
    {
        # The paper's seven.
        "vit-5b": _vit("63 1792 15360 16 16"),
        "vit-22b": _vit("48 6144 24576 48 48"),
        "llama3-8b": _lm("32 4096 14336 32 8", 128256),
        "qwen2-32b": _lm("64 5120 27648 40 8", 152064, layer=_QWEN2),
        "qwen2-72b": _lm("80 8192 29568 64 8", 152064, layer=_QWEN2),
        "dit-5b": _dit("28 3584 10240 28 28", 4096),
        "dit-30b": _dit("48 6144 24576 48 48", 5120),
        "gpt-175b": _lm(
            "96 12288 49152 96 96",
            50257,
            gated_mlp=False,
            tied_embeddings=True,
            layer=LayerOptions(positions=2048),
        ),
        # Vision transformers.
        "clip-vit-l-336": _vit("24 1024 4096 16 16", layer=LayerOptions(positions=577)),
        "internvit-300m": _vit("24 1024 4096 16 16", layer=LayerOptions(positions=1025)),
        "internvit-6b": _vit(
            "45 3200 12800 25 25",
            layer=LayerOptions(rms_norm=True, qk_norm=True, qkv_bias=False, positions=1025),
        ),
        "qwen2-vl-vit": _vit("32 1280 5120 16 16", **_QWEN_MERGER, layer=LayerOptions(rotary=True)),
        "qwen2.5-vl-vit": _vit(
            "32 1280 3420 16 16", **_QWEN_MERGER, gated_mlp=True, layer=_QWEN_VIT
        ),
        "qwen3-vl-vit": _vit(
            "27 1152 4304 16 16",
            **{
                **_QWEN_MERGER,
                "patch_size": 16,
                "output_size": 4096,
                "projector_hidden_size": 4608,
            },
            layer=LayerOptions(rotary=True, tap_layers=(8, 16, 24), positions=2304),
        ),
        "moonvit-400m": _vit(
            "27 1152 4304 16 16",
            patches_per_token=4,
            output_size=2048,
            projector_hidden_size=4608,
            layer=LayerOptions(rotary=True, positions=4096),
        ),
        "llama3.2-vision-vit": _vit(
            # 32 layers over tiles, 8 more over all of them; 4 tiles of 560 x 560 pixels an image.
            "40 1280 5120 16 16",
            output_size=4096,
            layer=LayerOptions(positions=1601),
        ),
        # Language models.
        "llama3-70b": _lm("80 8192 28672 64 8", 128256),
        "qwen2-7b": _lm("28 3584 18944 28 4", 152064, layer=_QWEN2),
        "qwen2.5-7b": _lm("28 3584 18944 28 4", 152064, layer=_QWEN2),
        "qwen2.5-32b": _lm("64 5120 27648 40 8", 152064, layer=_QWEN2),
        "qwen2.5-72b": _lm("80 8192 29568 64 8", 152064, layer=_QWEN2),
        "llama3.2-11b-vision-lm": _lm(
            "40 4096 14336 32 8",
            128256,
            layer=LayerOptions(
                context_size=4096,
                cross_attention_layers=tuple(range(3, 40, 5)),
                cross_attention_alone=True,
            ),
        ),
        "qwen3-8b": _lm("36 4096 12288 32 8", 151936, layer=_QWEN3),
        "qwen3-30b-a3b": _lm(
            "48 2048 6144 32 4",
            151936,
            layer=replace(_QWEN3, experts=ExpertOptions(count=128, active=8, ffn_hidden_size=768)),
        ),
        "deepseek-v2-lite": _latent_lm("27 2048 10944 16", 102400, _V2_EXPERTS),
        "moonlight-16b-a3b": _latent_lm("27 2048 11264 16", 163840, _V2_EXPERTS),
        "deepseek-v3": _latent_lm(
            "61 7168 18432 128",
            129280,
            ExpertOptions(
                count=256,
                active=8,
                ffn_hidden_size=2048,
                shared_ffn_hidden_size=2048,
                dense_layers=3,
            ),
            query_rank=1536,
        ),
        # Diffusion transformers.
        "moviegen-30b": _dit("48 6144 16384 48 48", 6144, gated_mlp=True),
        "wan2.1-1.3b": _dit("30 1536 8960 12 12", 4096),
        "wan2.1-14b": _dit("40 5120 13824 40 40", 4096),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model with the parallel sizes that it is trained with."""

    model: ModelSpec
    parallel: ParallelSizes


def _vlm(name: str, vision: str, language: str, sizes: tuple[int, int, int]) -> Setup:
    backbone = replace(MODULES[language], name="language", after=("vision",))
    encoder = replace(
        MODULES[vision],
        name="vision",
        patches_per_token=16,
        output_size=backbone.hidden_size,
        projector_hidden_size=backbone.hidden_size,
    )
    return _setup(name, (encoder, backbone), sizes)


def _open_vlm(
    name: str, vision: str, language: str, projector: Mapping[str, Any] = MappingProxyType({})
) -> Setup:
    """An open model: its tower as published, with its own projector unless one is given here."""
    backbone = replace(MODULES[language], name="language", after=("vision",))
    encoder = replace(
        MODULES[vision], name="vision", output_size=backbone.hidden_size, **dict(projector)
    )
    return _setup(name, (encoder, backbone), (2, 4, 1))


def _t2v(name: str, text: str, diffusion: str, sizes: tuple[int, int, int]) -> Setup:
    encoder = replace(MODULES[text], name="text", kind=ModuleKind.TEXT)
    backbone = replace(
        MODULES[diffusion], name="diffusion", after=("text",), input_size=encoder.hidden_size
    )
    return _setup(name, (encoder, backbone), sizes)


def _setup(name: str, modules: tuple[ModuleSpec, ...], sizes: tuple[int, int, int]) -> Setup:
    tensor, pipeline, data = sizes
    return Setup(
        model=ModelSpec(name=name, modules=modules),
        parallel=ParallelSizes(
            pipeline=pipeline, tensor=tensor, data=data, sequence_parallel=tensor > 1
        ),
    )


SETUPS: Mapping[str, Setup] = MappingProxyType(
    {
        setup.model.name: setup
        for setup in (
            _vlm("vlm-s", "vit-5b", "llama3-8b", (4, 4, 1)),
            _vlm("vlm-m", "vit-5b", "qwen2-32b", (8, 4, 1)),
            _vlm("vlm-l", "vit-22b", "qwen2-72b", (8, 8, 1)),
            _t2v("t2v-s", "llama3-8b", "dit-5b", (4, 4, 1)),
            _t2v("t2v-l", "qwen2-32b", "dit-30b", (8, 8, 1)),
            _vlm("vlm-xl-8k", "vit-22b", "gpt-175b", (8, 8, 128)),
            _vlm("vlm-xl-16k", "vit-22b", "gpt-175b", (8, 16, 128)),
            _t2v("t2v-xl-3k", "qwen2-72b", "dit-30b", (8, 4, 96)),
            _t2v("t2v-xl-6k", "qwen2-72b", "dit-30b", (8, 8, 96)),
            _open_vlm("qwen2.5-vl-7b", "qwen2.5-vl-vit", "qwen2.5-7b"),
            _open_vlm(
                "qwen2.5-vl-32b",
                "qwen2.5-vl-vit",
                "qwen2.5-32b",
                MappingProxyType({"ffn_hidden_size": 3456}),
            ),
            _open_vlm(
                "qwen2.5-vl-72b",
                "qwen2.5-vl-vit",
                "qwen2.5-72b",
                MappingProxyType({"ffn_hidden_size": 3456}),
            ),
            _open_vlm("qwen3-vl-8b", "qwen3-vl-vit", "qwen3-8b"),
            _open_vlm(
                "internvl3-8b",
                "internvit-300m",
                "qwen2.5-7b",
                # 1024 patches of a tile become 256 tokens.
                MappingProxyType({"patches_per_token": 4, "projector_hidden_size": 3584}),
            ),
            _open_vlm("kimi-vl-a3b", "moonvit-400m", "moonlight-16b-a3b"),
            _open_vlm("llama3.2-11b-vision", "llama3.2-vision-vit", "llama3.2-11b-vision-lm"),
        )
    }
)


def module_preset(name: str) -> ModuleSpec:
    """The module called `name`; `ConfigError` lists the names there are."""
    if name not in MODULES:
        raise ConfigError(f"no module preset {name!r}; there are {sorted(MODULES)}")
    return MODULES[name]


def setup_preset(name: str) -> Setup:
    """The setup called `name`, in small letters; `ConfigError` lists the names there are."""
    if name not in SETUPS:
        raise ConfigError(f"no setup preset {name!r}; there are {sorted(SETUPS)}")
    return SETUPS[name]
