"""Chunks of a vision transformer; the last one projects into the width of its consumer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.models.chunk import ChunkSetting, ModelChunk, run_block
from megatron_pipeweaver.models.patches import RotaryViTModel, fold_patches, patch_rotation
from megatron_pipeweaver.models.projector import build_projector
from megatron_pipeweaver.models.specs import uses_transformer_engine, vision_layer_spec
from megatron_pipeweaver.models.strategy import StrategyLayer


@final
class VisionChunk(ModelChunk):
    """Some layers of a ViT: with the patch embedding in front, or the projector behind.

    Parameters are named ``<module>_model.`` and ``<module>_projection.``, as in Megatron's
    LLaVA model.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(setting)
        module, place = setting.module, setting.place
        self._model_name = f"{module.name}_model"
        self._projection_name = f"{module.name}_projection"
        self._key = setting.options.encoder(module.name).images
        build = _first_model if place.is_first else _later_model
        self.add_module(self._model_name, build(setting))
        self._folded = module.patches_per_token if place.is_last else 1
        self._class_tokens = int(setting.options.class_token and place.is_last)
        self._rotary = is_rotary(module)
        image_size = setting.options.encoder(module.name).image_size
        self._grid = image_size // (module.patch_size or 1)
        if place.is_last and module.output_size is not None:
            projector = build_projector(module, setting.options, setting.groups)
            self.add_module(self._projection_name, projector)

    @property
    def layers(self) -> Sequence[StrategyLayer]:
        """The chunk's transformer layers."""
        layers: Sequence[StrategyLayer] = self._model.decoder.layers
        return layers

    @property
    def _model(self) -> Any:
        return getattr(self, self._model_name)

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The microbatch's images for this encoder."""
        images: Tensor | None = batch.get(self._key)
        return 0 if images is None else len(images)

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Images, or the hidden states of the stage in front, to hidden states [S, B, H]."""
        if self.place.is_first:
            images_BCYX = self._images(batch, items)
            hidden_SBH = self._model(images_BCYX).permute(1, 0, 2).contiguous()
        else:
            rotation = self._rotation() if self._rotary else None
            hidden_SBH = run_block(self._model.decoder, self.only_input(inputs), rotation)
        if self._class_tokens:
            hidden_SBH = hidden_SBH[self._class_tokens :].contiguous()
        if self._folded > 1:
            hidden_SBH = fold_patches(hidden_SBH, self._folded)
        projector = getattr(self, self._projection_name, None)
        output: Tensor = hidden_SBH if projector is None else projector(hidden_SBH)
        return output

    def _rotation(self) -> Tensor:
        return patch_rotation(self._grid, self._model.decoder.config.kv_channels)

    def _images(self, batch: Mapping[str, Any], items: slice) -> Tensor:
        if batch.get(self._key) is None:
            raise ConfigError(
                f"chunk {self.place.module}{self.place.stage}: the microbatch has no "
                f"{self._key!r}; a microbatch without images has no vision pass"
            )
        images: Tensor = batch[self._key][items]
        return images.to(self._model.conv1.weight.dtype)


def is_rotary(module: ModuleSpec) -> bool:
    """Whether patches know their place by rotary embeddings in every layer (Qwen2-VL)."""
    return bool(module.layer.rotary)


def _first_model(setting: ChunkSetting) -> Any:
    """Megatron's CLIP ViT, or one of rotary positions, with the chunk's layers."""
    module, options = setting.module, setting.options
    image_size = options.encoder(module.name).image_size
    if module.patch_size is None or image_size % module.patch_size:
        raise ConfigError(
            f"module {module.name!r}: image_size {image_size} is not a multiple of "
            f"patch_size {module.patch_size}"
        )
    side, block = image_size // module.patch_size, math.isqrt(module.patches_per_token)
    if block * block != module.patches_per_token or side % block:
        raise ConfigError(
            f"module {module.name!r}: patches_per_token {module.patches_per_token} does not divide "
            f"{side} x {side} patches into squares; choose the square of a divisor of {side}"
        )
    if is_rotary(module):
        return RotaryViTModel(setting)
    norm = {} if uses_transformer_engine(options) else {"ln_pre_impl": WrappedTorchNorm}
    model = CLIPViTModel(
        setting.config,
        vision_layer_spec(options),
        add_class_token=options.class_token,
        class_token_len=int(options.class_token),
        patch_dim=module.patch_size,
        img_h=image_size,
        img_w=image_size,
        pg_collection=setting.groups,
        vp_stage=setting.place.segment,
        **norm,
    )
    if module.image_channels != model.conv1.in_channels:
        model.conv1 = torch.nn.Conv2d(
            module.image_channels,
            module.hidden_size,
            kernel_size=module.patch_size,
            stride=module.patch_size,
            bias=False,
        )
    return model


def _later_model(setting: ChunkSetting) -> Any:
    """A block of layers under the name that it has in the whole ViT."""
    model = MegatronModule(config=setting.config)
    model.decoder = TransformerBlock(
        setting.config,
        vision_layer_spec(setting.options),
        pre_process=False,
        # A ViT of learned positions is CLIP's, whose last norm its consumers do without.
        post_process=is_rotary(setting.module) and setting.place.is_last,
        pg_collection=setting.groups,
        vp_stage=setting.place.segment,
    )
    return model
