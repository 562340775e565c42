"""Megatron's own LLaVA model in chunks: what a script would build in one piece, cut.

The script's model provider says what the model is. It is run up to the point where it makes a
`LLaVAModel`; what it hands over there is what the chunks are made from.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from megatron.core import parallel_state
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel, get_num_image_embeddings
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.chunk import ChunkSetting, ModelChunk, run_block
from megatron_pipeweaver.models.configs import ChunkLayers
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import global_name, tied_name
from megatron_pipeweaver.models.strategy import StrategyLayer
from megatron_pipeweaver.plugin.data import DescribeMicrobatch
from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from megatron_pipeweaver.plugin.providers import ChunkProvider, ChunkSeries, refuse_language_layers
from megatron_pipeweaver.plugin.vision_language import LANGUAGE, VISION

Given = Mapping[str, Any]
"""What a script hands to `LLaVAModel`, by parameter."""

_UNSUPPORTED = ("pixel_shuffle", "tile_tags", "dynamic_resolution", "hybrid_layer_pattern")


class Llava:
    """Scripts of the shape of Megatron-LM's ``pretrain_vlm.py``; a `ModelFamily`.

    Their microbatches hold ``image`` [images, C, Y, X] and ``tokens`` [B, S], in which one token
    stands for a whole image.
    """

    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """The ViT and the language model, both as wide as the arguments say."""
        if args.context_parallel_size > 1:
            raise ConfigError(
                f"--context-parallel-size {args.context_parallel_size}: chunks of a LLaVAModel run "
                "whole sequences; give --context-parallel-size 1, or train scripts/pretrain_vlm.py"
            )
        refuse_language_layers(args, "chunks of a LLaVAModel")
        common: dict[str, Any] = {
            "hidden_size": args.hidden_size,
            "ffn_hidden_size": args.ffn_hidden_size,
            "attention_heads": args.num_attention_heads,
            "kv_groups": (
                args.num_query_groups if args.group_query_attention else args.num_attention_heads
            ),
            "gated_mlp": args.swiglu,
        }
        vision = ModuleSpec(
            name=VISION,
            kind=ModuleKind.VISION,
            layers=args.encoder_num_layers,
            output_size=args.hidden_size,
            projector_hidden_size=args.ffn_hidden_size,
            patch_size=args.patch_dim,
            **common,
        )
        language = ModuleSpec(
            name=LANGUAGE,
            kind=ModuleKind.LANGUAGE,
            layers=args.decoder_num_layers or args.num_layers,
            after=(VISION,),
            vocab_size=args.padded_vocab_size,
            **common,
        )
        return ModelSpec(name="llava", modules=(vision, language))

    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """One image per sample."""
        item = self._item(args)
        return MicrobatchMetadata(
            sequence_length=(args.dataloader_seq_length or args.seq_length) + item.tokens,
            samples=args.micro_batch_size,
            items={VISION: (item,) * args.micro_batch_size},
        )

    def expected(self, args: argparse.Namespace) -> Sequence[MicrobatchMetadata]:
        """The typical one alone."""
        return (self.typical(args),)

    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """Reads shapes, and counts the tokens that stand for images."""
        item = self._item(args)

        def read(microbatch: Mapping[str, Any]) -> MicrobatchMetadata:
            tokens_BS = microbatch["tokens"]
            most = int((tokens_BS == DEFAULT_IMAGE_TOKEN_INDEX).sum(1).max())
            images = len(microbatch["image"])
            return MicrobatchMetadata(
                sequence_length=tokens_BS.shape[1] + most * (item.tokens - 1),
                samples=tokens_BS.shape[0],
                items={VISION: (item,) * images} if images else {},
            )

        return read

    def provider(
        self, args: argparse.Namespace, layout: ChunkLayout, original: ChunkProvider | None
    ) -> ChunkProvider:
        """Makes the rank's chunks of what the script's own provider would build."""
        if original is None:
            raise ConfigError(
                "--pipeweaver: this script hands no model provider to pretrain; "
                "give it one that builds a LLaVAModel"
            )
        spec = self.spec(args)

        def build(groups: Any) -> list[ModelChunk]:
            given, frozen = captured(args, original)
            model = tied(spec, given)
            chunks = [
                _CHUNKS[place.module](_setting(model, layout, place, given, groups), given)
                for place in layout.chunks_of_rank(groups.pp.rank())
            ]
            if args.use_cpu_initialization:
                copy_initial_values(chunks, given, groups, args.seed)
            freeze(chunks, frozen)
            return chunks

        return ChunkSeries(build)

    @staticmethod
    def _item(args: argparse.Namespace) -> Item:
        patches = (args.img_h // args.patch_dim) * (args.img_w // args.patch_dim)
        tokens = get_num_image_embeddings(
            args.img_h,
            args.img_w,
            args.patch_dim,
            "clip",
            getattr(args, "disable_vision_class_token", False),
            1,
            pixel_shuffle=False,
            use_tile_tags=False,
        )
        return Item(units=patches + 1, tokens=tokens)


def captured(
    args: argparse.Namespace, provider: Callable[..., Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """What `provider` makes a `LLaVAModel` from, on one pipeline rank, and what it freezes of it.

    The provider may change sequence lengths in Megatron's arguments, which is meant to stay. What
    it makes is a model without parts, which can be frozen and handed back, and no more.

    Returns:
        What it hands to `LLaVAModel`, by parameter, and the names of the parts that are frozen.

    Raises:
        ConfigError: it makes no `LLaVAModel`, one of a kind that is not cut, or changes it.
    """
    given: dict[str, Any] = {}
    frozen: dict[str, bool] = {}
    parameters = inspect.signature(LLaVAModel.__init__)

    def capture(self: Any, *positional: Any, **named: Any) -> None:
        torch.nn.Module.__init__(self)
        given.update(parameters.bind(self, *positional, **named).arguments)
        del given["self"]

    def note_frozen(
        self: Any,
        freeze_language_model: bool,
        freeze_vision_model: bool,
        freeze_vision_projection: bool,
    ) -> None:
        del self
        frozen["language_model"] = freeze_language_model
        frozen["vision_model"] = freeze_vision_model
        frozen["vision_projection"] = freeze_vision_projection

    patches = [
        Patch(LLaVAModel, "__init__", capture),
        Patch(LLaVAModel, "freeze", note_frozen),
        Patch(args, "pipeline_model_parallel_size", 1),
        Patch(args, "virtual_pipeline_model_parallel_size", None),
        Patch(parallel_state, "is_pipeline_first_stage", lambda *_, **__: True),
        Patch(parallel_state, "is_pipeline_last_stage", lambda *_, **__: True),
    ]
    try:
        with PatchSet(patches):
            provider()
    except AttributeError as error:
        if not given:
            raise
        raise ConfigError(
            f"--pipeweaver: the script's model provider changes the LLaVAModel that it made "
            f"({error}), which chunks cannot follow; have it freeze parts of it and no more"
        ) from error
    if not given:
        raise ConfigError(
            "--pipeweaver: the script's model provider makes no LLaVAModel, and no other model "
            "can be cut from outside; build it from PipeWeaver's chunks"
        )
    for name in _UNSUPPORTED:
        if given.get(name):
            raise ConfigError(f"--pipeweaver: a LLaVAModel with {name} cannot be cut; leave it out")
    if getattr(given["vision_transformer_config"], "vision_model_type", "clip") != "clip":
        raise ConfigError("--pipeweaver: only a LLaVAModel with a CLIP encoder can be cut")
    return given, frozenset(name for name, is_frozen in frozen.items() if is_frozen)


def tied(spec: ModelSpec, given: Given) -> ModelSpec:
    """`spec`, whose language model has tied embeddings if the script's has.

    Only the script knows; plans need not, since a pipeline holds both copies.
    """
    shares = bool(given.get("share_embeddings_and_output_weights"))
    language = replace(spec.backbone, tied_embeddings=shares)
    return replace(spec, modules=(*spec.modules[:-1], language))


def freeze(chunks: Sequence[ModelChunk], parts: Collection[str]) -> None:
    """Have no parameter of `parts`, named as in `LLaVAModel`, trained."""
    for chunk in chunks:
        for name, child in chunk.named_children():
            if name in parts:
                child.requires_grad_(False)


def _setting(spec: ModelSpec, layout: ChunkLayout, place: Any, given: Given, groups: Any) -> Any:
    """What a chunk is made from; its rank's chunks share the root config that `given` holds."""
    cut = next(one for one in layout.modules if one.module == place.module)
    root = given["language_transformer_config"]
    config = copy.copy(given[f"{place.module}_transformer_config"])
    for one, size in ((root, layout.virtual_size), (config, cut.segments)):
        one.pipeline_model_parallel_size = layout.pipeline_size
        one.virtual_pipeline_model_parallel_size = size if layout.pipeline_size > 1 else None
    config.pipeline_model_parallel_layout = ChunkLayers(cut, place)
    return ChunkSetting(
        model=spec,
        module=spec.module(place.module),
        place=place,
        root=root,
        config=config,
        options=ModelOptions(),
        groups=groups,
    )


def _under_strategies(spec: Any) -> Any:
    """A layer specification whose layers run under memory strategies."""
    return replace(spec, module=StrategyLayer) if spec.module is TransformerLayer else spec


class LlavaChunk(ModelChunk):
    """A chunk with the face of a `LLaVAModel`: its arguments, and a loss mask beside the output."""

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One stage of one pass; as `LLaVAModel`, the output and the mask of its tokens."""
        inputs, self._inputs = self._inputs, ()
        items, self._items = self._items, slice(None)
        batch = {
            "images": images,
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "loss_mask": loss_mask,
            "packed_seq_params": packed_seq_params,
        }
        output = self.run(batch, inputs, items)
        viewless: Tensor = make_viewless_tensor(
            output, requires_grad=output.requires_grad, keep_graph=True
        )
        mask: Tensor | None = batch["loss_mask"]
        return viewless, mask


@final
class LlavaVisionChunk(LlavaChunk):
    """Some layers of the ViT; parameters are named as in `LLaVAModel`."""

    def __init__(self, setting: ChunkSetting, given: Given) -> None:
        super().__init__(setting)
        place, groups = setting.place, setting.groups
        layer = _under_strategies(given["vision_transformer_layer_spec"])
        if place.is_first:
            self.vision_model = CLIPViTModel(
                setting.config,
                layer,
                img_h=given["img_h"],
                img_w=given["img_w"],
                patch_dim=given["patch_dim"],
                class_token_len=1,
                add_class_token=True,
                model_subtype="clip",
                pg_collection=groups,
                vp_stage=place.segment,
            )
        else:
            self.vision_model = MegatronModule(config=setting.config)
            self.vision_model.decoder = TransformerBlock(
                setting.config,
                layer,
                pre_process=False,
                post_process=False,
                pg_collection=groups,
                vp_stage=place.segment,
            )
        if place.is_last:
            self.vision_projection = MultimodalProjector(
                given["vision_projection_config"],
                given["vision_projection_layer_spec"],
                given.get("vision_projection_type", "mlp"),
                setting.config.hidden_size,
                tp_group=groups.tp,
            )
        self._class_tokens = 1 if given["drop_vision_class_token"] else 0

    @property
    def layers(self) -> Sequence[StrategyLayer]:
        """The chunk's transformer layers."""
        layers: Sequence[StrategyLayer] = self.vision_model.decoder.layers
        return layers

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Images, or the hidden states of the stage in front, to hidden states [S, B, H]."""
        hidden_SBH: Tensor
        if self.place.is_first:
            images_BCYX = batch["images"][items].to(self.vision_model.conv1.weight.dtype)
            hidden_SBH = self.vision_model(images_BCYX).permute(1, 0, 2).contiguous()
        else:
            hidden_SBH = run_block(self.vision_model.decoder, self.only_input(inputs))
        if not self.place.is_last:
            return hidden_SBH
        projected: Tensor = self.vision_projection(hidden_SBH[self._class_tokens :].contiguous())
        return projected


@final
class LlavaLanguageChunk(LlavaChunk):
    """Some layers of the language model, inside a `LLaVAModel` without encoder.

    That model places the images among the tokens and makes the loss; it is kept beside the
    parameters, which are named as in the whole model.
    """

    def __init__(self, setting: ChunkSetting, given: Given) -> None:
        super().__init__(setting)
        place = setting.place
        self.embeds_tokens = place.is_first
        own = {
            "language_transformer_config": setting.config,
            "language_transformer_layer_spec": _under_strategies(
                given["language_transformer_layer_spec"]
            ),
            "pre_process": place.is_first,
            "post_process": place.is_last,
            "add_encoder": False,
            "add_decoder": True,
            "parallel_output": True,
            "pg_collection": setting.groups,
            "vp_stage": place.segment,
        }
        llava = LLaVAModel(**{**given, **own})
        # It would pad every sample to the longest that there may be.
        llava._language_is_pipeline_parallel = False
        self._llava = (llava,)
        self.language_model = llava.language_model

    @property
    def layers(self) -> Sequence[StrategyLayer]:
        """The chunk's transformer layers."""
        layers: Sequence[StrategyLayer] = self.language_model.decoder.layers
        return layers

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding on the first chunk, the output layer's weight on the last, else `None`."""
        weight: Tensor | None = self.language_model.shared_embedding_or_output_weight()
        return weight

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Tokens and image embeddings, or hidden states, to hidden states, or losses [B, S].

        The mask in `batch` becomes that of the sequence with its images in place.
        """
        del items
        llava = self._llava[0]
        if self.place.is_first:
            passed = torch.cat(inputs, 1) if inputs else _no_images(batch["input_ids"])
        else:
            passed = self.only_input(inputs)
        llava.set_input_tensor([passed])
        output, mask = llava(**batch)
        llava.encoder_hidden_state = self.language_model.decoder.input_tensor = None
        batch["loss_mask"] = mask  # type: ignore[index]
        result: Tensor = output
        return result


_CHUNKS: Mapping[str, Callable[[ChunkSetting, Given], ModelChunk]] = {
    VISION: LlavaVisionChunk,
    LANGUAGE: LlavaLanguageChunk,
}


def _no_images(input_ids: Tensor) -> Tensor:
    """What a `LLaVAModel` makes of no images."""
    return torch.empty(0, 0, 0, device=input_ids.device)


def copy_initial_values(chunks: Sequence[ModelChunk], given: Given, groups: Any, seed: int) -> None:
    """Give the chunks the values that the whole model has on one pipeline rank under `seed`.

    The whole model is built on the CPU for that, and let go of again.
    """
    whole = {**given, "pg_collection": groups, "pre_process": True, "post_process": True}
    whole |= {"add_encoder": True, "add_decoder": True}
    config = copy.copy(given["language_transformer_config"])
    config.pipeline_model_parallel_size = 1
    config.virtual_pipeline_model_parallel_size = None
    whole["language_transformer_config"] = config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = dict(LLaVAModel(**whole).named_parameters())
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.copy_(values[tied_name(chunk, global_name(chunk, name))])
