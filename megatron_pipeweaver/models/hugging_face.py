"""Hugging Face checkpoints of vision-language models: what model they hold, and its parameters.

    config.json ─► HuggingFaceModel: specification and options ─► build_chunks
    *.safetensors ─► SafetensorsFolder ─► load_parameters(chunks): every parameter by its name

LLaVA (CLIP, Llama or Qwen2) and Qwen2-VL. Only safetensors are read, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.activations import quick_gelu
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.options import ModelOptions

VISION, LANGUAGE = "vision", "language"
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": torch.nn.functional.gelu,
}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
}
_QWEN2 = {**_LLAMA, "max_position_embeddings": 32768}
_QWEN2_VL = {**_LLAMA, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0}
_QWEN2_VIT = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
}
"""What a configuration means where it leaves a key out: the defaults of `transformers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceModel:
    """A checkpoint's model in PipeWeaver's terms.

    `architecture` is its ``model_type``; `frames` is how often an image stands in its own
    channels, since Qwen2-VL's patches span two frames.
    """

    architecture: str
    spec: ModelSpec
    options: ModelOptions
    frames: int = 1


def read_model(folder: str | Path, image_size: int | None = None) -> HuggingFaceModel:
    """The model that ``config.json`` of a checkpoint describes.

    Args:
        folder: the checkpoint's.
        image_size: height and width of images; that of the ViT where it has one.

    Raises:
        ConfigError: it is no such model, or has what the chunks have not.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name the folder of a Hugging Face checkpoint"
        ) from error
    architecture = config.get("model_type")
    if architecture not in _READERS:
        raise ConfigError(
            f"{path}: model_type {architecture!r} cannot be imported; there are {list(_READERS)}"
        )
    return _READERS[architecture](_Config(str(path), config, {}), image_size)


@dataclass(frozen=True, slots=True)
class _Config:
    """A part of a configuration, with what its keys mean where they are left out."""

    where: str
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        value = self.values.get(key)
        if value is None:
            value = self.defaults.get(key)
        if value is None:
            raise ConfigError(f"{self.where}: has no {key}; complete the configuration")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value, or `default`."""
        value = self.values.get(key)
        return default if value is None else value

    def part(self, key: str, defaults: Mapping[str, Any]) -> _Config:
        """The configuration of a part of the model."""
        return _Config(f"{self.where}, {key}", self.values.get(key) or {}, defaults)

    def want(self, key: str, wanted: Sequence[Any], default: Any) -> None:
        """Refuse every other value of a key."""
        found = self.get(key, default)
        if found not in wanted:
            raise ConfigError(
                f"{self.where}: {key} {found!r} cannot be imported; only {list(wanted)}"
            )


def _read_llava(config: _Config, image_size: int | None) -> HuggingFaceModel:
    kind = (config.get("text_config") or {}).get("model_type", "llama")
    if kind not in ("llama", "qwen2"):
        raise ConfigError(
            f"{config.where}: a text_config of model_type {kind!r} cannot be imported; only "
            "'llama' and 'qwen2'"
        )
    vision = config.part("vision_config", _CLIP)
    text = config.part("text_config", _QWEN2 if kind == "qwen2" else _LLAMA)
    vision.want("model_type", ("clip_vision_model",), "clip_vision_model")
    config.want("vision_feature_select_strategy", ("default",), "default")
    config.want("multimodal_projector_bias", (True,), True)
    if image_size not in (None, vision["image_size"]):
        raise ConfigError(
            f"{config.where}: images of {image_size} pixels; its ViT has positions for "
            f"{vision['image_size']}, so give that"
        )
    feature = config.get("vision_feature_layer", -2)
    depth = vision["num_hidden_layers"]
    if not isinstance(feature, int) or not -depth <= feature <= depth:
        raise ConfigError(
            f"{config.where}: vision_feature_layer {feature!r} cannot be imported; give one layer"
        )
    language = _language(text, kind == "qwen2", config)
    encoder = ModuleSpec(
        name=VISION,
        kind=ModuleKind.VISION,
        # Hidden states are counted from the embedding; layers behind the one that is taken rest.
        layers=feature if feature >= 0 else depth + 1 + feature,
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        attention_heads=vision["num_attention_heads"],
        kv_groups=vision["num_attention_heads"],
        output_size=language.hidden_size,
        projector_hidden_size=language.hidden_size,
        patch_size=vision["patch_size"],
        layer=LayerOptions(positions=(vision["image_size"] // vision["patch_size"]) ** 2 + 1),
    )
    options = ModelOptions(
        image_size=vision["image_size"],
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
        class_token=True,
        max_sequence_length=text["max_position_embeddings"],
        rotary_base=_rotary_base(text),
        overrides={
            VISION: _encoder_fields(vision["hidden_act"], vision["layer_norm_eps"]),
            f"{VISION}_projection": _projector_fields(config.get("projector_hidden_act", "gelu")),
            LANGUAGE: _language_fields(text, qkv_bias=kind == "qwen2"),
        },
    )
    spec = ModelSpec(name="llava", modules=(encoder, language))
    return HuggingFaceModel(architecture="llava", spec=spec, options=options)


def _read_qwen2_vl(config: _Config, image_size: int | None) -> HuggingFaceModel:
    vision = config.part("vision_config", _QWEN2_VIT)
    # Older checkpoints have the language model's keys beside the ViT's.
    text = config.part("text_config", _QWEN2_VL)
    if not text.values:
        text = _Config(config.where, config.values, _QWEN2_VL)
    text.want("use_sliding_window", (False,), False)
    language = _language(text, True, config)
    merge = vision["spatial_merge_size"]
    width = vision["embed_dim"]
    encoder = ModuleSpec(
        name=VISION,
        kind=ModuleKind.VISION,
        layers=vision["depth"],
        hidden_size=width,
        ffn_hidden_size=width * vision["mlp_ratio"],
        attention_heads=vision["num_heads"],
        kv_groups=vision["num_heads"],
        output_size=language.hidden_size,
        projector_hidden_size=width * merge**2,
        patch_size=vision["patch_size"],
        image_channels=vision["in_channels"] * vision["temporal_patch_size"],
        patches_per_token=merge**2,
        layer=LayerOptions(rotary=True),
    )
    sections = _rope(text).get("mrope_section")
    if not sections:
        raise ConfigError(f"{text.where}: has no mrope_section; complete the configuration")
    options = ModelOptions(
        image_size=image_size or 16 * vision["patch_size"] * merge,
        image_token_id=config.get("image_token_id", 151655),
        max_sequence_length=text["max_position_embeddings"],
        position_embedding="mrope",
        rotary_base=_rotary_base(text),
        overrides={
            VISION: _encoder_fields(vision["hidden_act"], 1e-6),
            f"{VISION}_projection": _projector_fields("gelu"),
            LANGUAGE: {
                **_language_fields(text, qkv_bias=True),
                "mrope_section": list(sections),
            },
        },
    )
    return HuggingFaceModel(
        architecture="qwen2_vl",
        spec=ModelSpec(name="qwen2_vl", modules=(encoder, language)),
        options=options,
        frames=vision["temporal_patch_size"],
    )


_READERS: Mapping[str, Callable[[_Config, int | None], HuggingFaceModel]] = {
    "llava": _read_llava,
    "qwen2_vl": _read_qwen2_vl,
}


def _language(text: _Config, qkv_bias: bool, config: _Config) -> ModuleSpec:
    text.want("hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias"):
        text.want(key, (False,), False)
    heads = text["num_attention_heads"]
    usual = text["hidden_size"] // heads
    head_size = text.get("head_dim", usual)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return ModuleSpec(
        name=LANGUAGE,
        kind=ModuleKind.LANGUAGE,
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        attention_heads=heads,
        kv_groups=text.get("num_key_value_heads", heads),
        after=(VISION,),
        gated_mlp=True,
        vocab_size=text["vocab_size"],
        tied_embeddings=tied,
        layer=LayerOptions(
            head_size=head_size if head_size != usual else None, qkv_bias=qkv_bias or None
        ),
    )


def _language_fields(text: _Config, *, qkv_bias: bool) -> dict[str, Any]:
    return {
        "normalization": "RMSNorm",
        "layernorm_epsilon": text["rms_norm_eps"],
        "add_bias_linear": False,
        "add_qkv_bias": qkv_bias,
        "kv_channels": text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]),
    }


def _encoder_fields(activation: str, epsilon: float) -> dict[str, Any]:
    return {
        "normalization": "LayerNorm",
        "layernorm_epsilon": epsilon,
        "activation_func": _activation(activation),
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "bias_activation_fusion": False,  # which knows neither of these activations
    }


def _projector_fields(activation: str) -> dict[str, Any]:
    return {
        "activation_func": _activation(activation),
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "bias_activation_fusion": False,
    }


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation {name!r} cannot be imported; there are {list(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rope(text: _Config) -> Mapping[str, Any]:
    """Rotary parameters, under their name of today or that of old."""
    found: Mapping[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"{text.where}: rope type {kind!r} cannot be imported; only 'default'")
    return found


def _rotary_base(text: _Config) -> int:
    base = float(_rope(text).get("rope_theta") or text["rope_theta"])
    if base != int(base):
        raise ConfigError(f"{text.where}: rope_theta {base} is no whole number")
    return int(base)
