"""A Hugging Face checkpoint's tensors, and which of them make which parameter of the chunks.

Megatron keeps the heads of a group side by side in one matrix, and the gate of an MLP in front of
its value; the other parameters are tensors of the checkpoint under another name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.hugging_face import LANGUAGE, VISION, HuggingFaceModel
from megatron_pipeweaver.models.parameters import global_parameters

_TODAY: Sequence[tuple[str, str]] = (
    # Names changed over the years; these rules bring them to one form, in this order.
    (r"^model\.", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)


class SafetensorsFolder:
    """The tensors of a checkpoint, read one at a time.

    Args:
        folder: with ``model.safetensors``, or with several and their index.

    Raises:
        ConfigError: there are none; other formats are not read.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ConfigError("safetensors is not installed; pip install safetensors") from error
        self._folder = Path(folder)
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if not files:
            others = sorted(path.name for path in self._folder.glob("*.bin"))
            raise ConfigError(
                f"{folder}: has no *.safetensors"
                + (f", only {others}, which can run code when read" if others else "")
                + "; save the model with save_pretrained of today's transformers"
            )
        self._open: list[Any] = [
            safe_open(str(self._folder / name), framework="pt") for name in files
        ]
        self._place = {_today(name): (one, name) for one in self._open for name in one.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, by its name of today; `ConfigError` if there is none."""
        if name not in self._place:
            raise ConfigError(f"{self._folder}: has no tensor {name!r}; it does not fit its config")
        one, stored = self._place[name]
        tensor: Tensor = one.get_tensor(stored)
        return tensor


def _today(name: str) -> str:
    for pattern, replacement in _TODAY:
        name = re.sub(pattern, replacement, name)
    return name


def load_parameters(
    chunks: Sequence[ModelChunk], model: HuggingFaceModel, tensors: SafetensorsFolder
) -> None:
    """Give all parameters of `chunks` the checkpoint's values.

    Args:
        chunks: any chunks of `model`, without tensor parallelism. Rows of the vocabulary that the
            checkpoint has not become zero.
        model: what the checkpoint holds.
        tensors: its tensors.

    Raises:
        ConfigError: a tensor is missing, or has another shape.
    """
    recipes = _recipes(model)
    with torch.no_grad():
        for name, parameter in global_parameters(chunks):
            value = _value(_plain(name), model, recipes, tensors)
            if "embedding.word" in name or "output_layer" in name:
                value = _padded(value, parameter.shape[0])
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"{name}: the checkpoint has {tuple(value.shape)} and the model wants "
                    f"{tuple(parameter.shape)}; it does not fit its config"
                )
            parameter.copy_(value)


def _plain(name: str) -> str:
    """A parameter's name where norms stand alone; Transformer Engine joins them to what follows."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


Recipe = Callable[[SafetensorsFolder, str], Tensor]
"""Makes a parameter of tensors whose names begin with a prefix."""


def _value(
    name: str,
    model: HuggingFaceModel,
    recipes: Mapping[str, tuple[str, Recipe]],
    tensors: SafetensorsFolder,
) -> Tensor:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    key = name if layer is None else name.replace(layer[0], ".layers.*.")
    if key not in recipes:
        raise ConfigError(f"{name}: nothing in a {model.architecture} checkpoint makes it")
    prefix, recipe = recipes[key]
    return recipe(tensors, prefix.replace("*", layer[1]) if layer else prefix)


def _recipes(model: HuggingFaceModel) -> dict[str, tuple[str, Recipe]]:
    vision, language = (model.spec.module(name) for name in (VISION, LANGUAGE))
    make = _clip_recipes if model.architecture == "llava" else _qwen2_vit_recipes
    return {**make(vision), **_language_recipes(language)}


def _language_recipes(module: ModuleSpec) -> dict[str, tuple[str, Recipe]]:
    layer, theirs = "language_model.decoder.layers.*", "language_model.layers.*"
    head = "language_model.embed_tokens" if module.tied_embeddings else "lm_head"
    attention = f"{theirs}.self_attn"
    found: dict[str, tuple[str, Recipe]] = {
        f"{layer}.self_attention.linear_proj.weight": (f"{attention}.o_proj.weight", _same),
        f"{layer}.mlp.linear_fc1.weight": (f"{theirs}.mlp", _gate_and_value),
        f"{layer}.mlp.linear_fc2.weight": (f"{theirs}.mlp.down_proj.weight", _same),
        f"{layer}.input_layernorm.weight": (f"{theirs}.input_layernorm.weight", _same),
        f"{layer}.pre_mlp_layernorm.weight": (f"{theirs}.post_attention_layernorm.weight", _same),
        "language_model.decoder.final_layernorm.weight": ("language_model.norm.weight", _same),
        "language_model.embedding.word_embeddings.weight": (
            "language_model.embed_tokens.weight",
            _same,
        ),
        "language_model.output_layer.weight": (f"{head}.weight", _same),
    }
    for what in ("weight", "bias"):
        found[f"{layer}.self_attention.linear_qkv.{what}"] = (attention, _separate(module, what))
    return found


def _clip_recipes(module: ModuleSpec) -> dict[str, tuple[str, Recipe]]:
    layer, theirs = "vision_model.decoder.layers.*", "vision_tower.encoder.layers.*"
    found: dict[str, tuple[str, Recipe]] = {
        "vision_model.conv1.weight": ("vision_tower.embeddings.patch_embedding.weight", _same),
        "vision_model.position_embeddings.weight": (
            "vision_tower.embeddings.position_embedding.weight",
            _same,
        ),
        "vision_model.class_token": (
            "vision_tower.embeddings.class_embedding",
            lambda tensors, name: tensors[name].view(1, 1, -1),
        ),
    }
    for what in ("weight", "bias"):
        renamed = {
            f"{layer}.self_attention.linear_proj": f"{theirs}.self_attn.out_proj",
            f"{layer}.mlp.linear_fc1": f"{theirs}.mlp.fc1",
            f"{layer}.mlp.linear_fc2": f"{theirs}.mlp.fc2",
            f"{layer}.input_layernorm": f"{theirs}.layer_norm1",
            f"{layer}.pre_mlp_layernorm": f"{theirs}.layer_norm2",
            # So spelt in every CLIP.
            "vision_model.ln_pre": "vision_tower.pre_layrnorm",
            "vision_projection.encoder.linear_fc1": "multi_modal_projector.linear_1",
            "vision_projection.encoder.linear_fc2": "multi_modal_projector.linear_2",
        }
        found |= {f"{ours}.{what}": (f"{name}.{what}", _same) for ours, name in renamed.items()}
        key = f"{layer}.self_attention.linear_qkv.{what}"
        found[key] = (f"{theirs}.self_attn", _separate(module, what))
    return found


def _qwen2_vit_recipes(module: ModuleSpec) -> dict[str, tuple[str, Recipe]]:
    layer, theirs = "vision_model.decoder.layers.*", "visual.blocks.*"
    found: dict[str, tuple[str, Recipe]] = {
        # Frames of a patch become channels of their own.
        "vision_model.conv1.weight": (
            "visual.patch_embed.proj.weight",
            lambda tensors, name: tensors[name].flatten(1, 2),
        ),
    }
    for what in ("weight", "bias"):
        renamed = {
            f"{layer}.self_attention.linear_proj": f"{theirs}.attn.proj",
            f"{layer}.mlp.linear_fc1": f"{theirs}.mlp.fc1",
            f"{layer}.mlp.linear_fc2": f"{theirs}.mlp.fc2",
            f"{layer}.input_layernorm": f"{theirs}.norm1",
            f"{layer}.pre_mlp_layernorm": f"{theirs}.norm2",
            "vision_model.decoder.final_layernorm": "visual.merger.ln_q",
            "vision_projection.encoder.linear_fc1": "visual.merger.mlp.0",
            "vision_projection.encoder.linear_fc2": "visual.merger.mlp.2",
        }
        found |= {f"{ours}.{what}": (f"{name}.{what}", _same) for ours, name in renamed.items()}
        key = f"{layer}.self_attention.linear_qkv.{what}"
        found[key] = (f"{theirs}.attn.qkv.{what}", _joined(module))
    return found


def _same(tensors: SafetensorsFolder, name: str) -> Tensor:
    return tensors[name]


def _gate_and_value(tensors: SafetensorsFolder, prefix: str) -> Tensor:
    return torch.cat([tensors[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up")])


def _separate(module: ModuleSpec, what: str) -> Recipe:
    """Queries, keys and values that the checkpoint has apart."""

    def make(tensors: SafetensorsFolder, prefix: str) -> Tensor:
        return by_group([tensors[f"{prefix}.{part}_proj.{what}"] for part in "qkv"], module)

    return make


def _joined(module: ModuleSpec) -> Recipe:
    """Queries, keys and values that the checkpoint has one behind the other."""
    return lambda tensors, name: by_group(tensors[name].chunk(3), module)


def by_group(parts: Sequence[Tensor], module: ModuleSpec) -> Tensor:
    """Queries, keys and values of every group of heads side by side, as Megatron keeps them.

    Args:
        parts: [heads * size, ...], [groups * size, ...] twice.
        module: says how many heads and groups there are.
    """
    shaped = [one.view(module.kv_groups, -1, *one.shape[1:]) for one in parts]
    return torch.cat(shaped, 1).flatten(0, 1)


def _padded(value: Tensor, rows: int) -> Tensor:
    missing = rows - len(value)
    if missing <= 0:
        return value
    filling: Any = value.new_zeros(missing, *value.shape[1:])
    return torch.cat([value, filling])
