"""Chunks of a vision transformer; the last one projects into the width of its consumer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.models.chunk import ChunkSetting, NamedChunk, run_block
from megatron_pipeweaver.models.patches import PatchEmbedding, PatchRows, fold_patches
from megatron_pipeweaver.models.projector import build_projector
from megatron_pipeweaver.models.specs import uses_transformer_engine, vision_layer_spec


@final
class VisionChunk(NamedChunk):
    """Some layers of a ViT: with the patch embedding in front, or the projector behind.

    Parameters are named ``<module>_model.`` and ``<module>_projection.``, as in Megatron's
    LLaVA model.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(setting)
        module, place = setting.module, setting.place
        self._projection_name = f"{module.name}_projection"
        self._key = setting.options.encoder(module.name).images
        build = _first_model if place.is_first else _block_model
        self.hold(build(setting))
        self._folded = module.patches_per_token if place.is_last else 1
        self._class_tokens = int(setting.options.class_token and place.is_last)
        self._rotary = is_rotary(module)
        self._fused = uses_transformer_engine(setting.options)
        if place.is_last and module.output_size is not None:
            projector = build_projector(module, setting.options, setting.groups)
            self.add_module(self._projection_name, projector)

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The microbatch's images for this encoder."""
        images: Tensor | None = batch.get(self._key)
        return 0 if images is None else len(images)

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Images, or the hidden states of the stage in front, to hidden states [S, B, H]."""
        run = self._run_rotary if self._rotary else self._run_learned
        hidden_SBH = run(batch, inputs, items)
        projector = getattr(self, self._projection_name, None)
        output: Tensor = hidden_SBH if projector is None else projector(hidden_SBH)
        return output

    def _run_learned(
        self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice
    ) -> Tensor:
        """Layers whose patches know their place by learned positions; images have one size."""
        if self.place.is_first:
            images_BCYX = self._images(batch, items).to(self.model.conv1.weight)
            hidden_SBH = self.model(images_BCYX).permute(1, 0, 2).contiguous()
        else:
            hidden_SBH = run_block(self.model.decoder, self.only_input(inputs))
        if self._class_tokens:
            hidden_SBH = hidden_SBH[self._class_tokens :].contiguous()
        return fold_patches(hidden_SBH, self._folded) if self._folded > 1 else hidden_SBH

    def _run_rotary(
        self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice
    ) -> Tensor:
        """Layers whose patches turn by their place; images have sizes of their own."""
        images = self._images(batch, items)
        module, decoder = self.module_spec, self.model.decoder
        rows = PatchRows.of(images, module.patch_size or 1, math.isqrt(module.patches_per_token))
        if self.place.is_first:
            hidden_SBH = self.model.conv1(images, rows)
        else:
            hidden_SBH = self.only_input(inputs)
        known = rows.attention(decoder.config.kv_channels, hidden_SBH.device, fused=self._fused)
        output = run_block(decoder, hidden_SBH, **known)
        return rows.fold(output) if self._folded > 1 else output

    def _images(self, batch: Mapping[str, Any], items: slice) -> Any:
        """The pass's images: [B, C, Y, X], or one [C, Y, X] each, on the host or the device."""
        if batch.get(self._key) is None:
            raise ConfigError(
                f"chunk {self.place.module}{self.place.stage}: the microbatch has no "
                f"{self._key!r}; a microbatch without images has no vision pass"
            )
        return batch[self._key][items]


def is_rotary(module: ModuleSpec) -> bool:
    """Whether patches know their place by rotary embeddings in every layer (Qwen2-VL)."""
    return bool(module.layer.rotary)


def _first_model(setting: ChunkSetting) -> Any:
    """Megatron's CLIP ViT, or one of rotary positions, with the chunk's layers."""
    module, options = setting.module, setting.options
    image_size = options.encoder(module.name).image_size
    block = math.isqrt(module.patches_per_token)
    if block * block != module.patches_per_token:
        raise ConfigError(
            f"module {module.name!r}: patches_per_token {module.patches_per_token} is no square; "
            "choose 1, 4, 9, ..."
        )
    if module.patch_size is None:
        raise ConfigError(f"module {module.name!r}: a ViT needs a patch_size")
    if is_rotary(module):
        if setting.config.kv_channels % 4:
            raise ConfigError(
                f"module {module.name!r}: heads are {setting.config.kv_channels} wide, and patches "
                "turn pairs by row and by column; choose a multiple of 4"
            )
        model = _block_model(setting)
        model.conv1 = PatchEmbedding(module.image_channels, module.hidden_size, module.patch_size)
        return model
    if image_size % (module.patch_size * block):
        raise ConfigError(
            f"module {module.name!r}: image_size {image_size} is not a multiple of "
            f"{module.patch_size * block}, patch_size {module.patch_size} times the {block} "
            "patches of a token's side"
        )
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


def _block_model(setting: ChunkSetting) -> Any:
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
