"""Vision-language models from Megatron's arguments: a ViT and a language model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.hugging_face import HuggingFaceModel, read_model
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.plugin.data import DescribeMicrobatch
from megatron_pipeweaver.plugin.providers import ChunkFamily, model_options

VISION, LANGUAGE = "vision", "language"


@final
class VisionLanguage(ChunkFamily):
    """A ViT and a language model.

    Microbatches hold ``images`` [items, C, Y, X], and ``tokens``, ``labels``, ``loss_mask`` and
    ``position_ids`` [B, S], an image's place in the tokens filled with `IMAGE_TOKEN`.
    """

    IMAGE_TOKEN = DEFAULT_IMAGE_TOKEN_INDEX

    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """The modules; widths of the ViT are the language model's where no flag gives them."""
        missing = [
            flag
            for flag in ("encoder_num_layers", "decoder_num_layers")
            if getattr(args, flag) is None
        ]
        if missing:
            flag = f"--{missing[0].replace('_', '-')}"
            raise ConfigError(
                f"{flag} is missing; give --encoder-num-layers for the ViT and "
                "--decoder-num-layers for the language model"
            )
        if args.img_h != args.img_w:
            raise ConfigError(
                f"--img-h {args.img_h} --img-w {args.img_w}: chunks take square images; "
                "give both the same size"
            )
        if args.hf_model is not None:
            return hugging_face_spec(args, read_model(args.hf_model, args.img_h))
        return ModelSpec(name="vlm", modules=(_vision_spec(args), _language_spec(args)))

    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """A microbatch whose samples show half of the images that they may."""
        item = self._item(args)
        images = max(1, args.max_images * args.micro_batch_size // 2)
        return MicrobatchMetadata(
            sequence_length=args.seq_length,
            samples=args.micro_batch_size,
            items={VISION: (item,) * images},
        )

    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """Reads shapes."""
        item = self._item(args)

        def read(microbatch: Mapping[str, Any]) -> MicrobatchMetadata:
            samples, length = microbatch["tokens"].shape
            images = len(microbatch["images"])
            documents = microbatch.get("cu_seqlens")
            return MicrobatchMetadata(
                sequence_length=length,
                samples=samples,
                items={VISION: (item,) * images} if images else {},
                document_lengths=() if documents is None else tuple(documents.diff().tolist()),
            )

        return read

    def options(self, args: argparse.Namespace) -> ModelOptions:
        """How chunks are made, with what an imported model does otherwise."""
        plain = {"sequence_parallel": False, "context_parallel_size": 1, "tp_comm_overlap": False}
        # A projector has no heads; Megatron wants as many as tensor-parallel ranks.
        heads = {"num_attention_heads": args.tensor_model_parallel_size}
        overrides: Mapping[str, Mapping[str, Any]] = {
            VISION: plain,
            f"{VISION}_projection": {**plain, **heads},
            LANGUAGE: {"kv_channels": args.kv_channels},
        }
        options = replace(model_options(args, overrides), image_token_id=self.IMAGE_TOKEN)
        if args.hf_model is None:
            return options
        theirs = read_model(args.hf_model, args.img_h).options
        return replace(
            options,
            class_token=theirs.class_token,
            rotary_base=theirs.rotary_base,
            overrides={name: {**one, **theirs.overrides[name]} for name, one in overrides.items()},
        )

    def tokens_per_image(self, args: argparse.Namespace) -> int:
        """Tokens of the language model that stand for one image."""
        return self._item(args).tokens

    @staticmethod
    def _item(args: argparse.Namespace) -> Item:
        patches = (args.img_h // args.patch_dim) ** 2
        class_tokens = int(args.hf_model is not None)
        return Item(units=patches + class_tokens, tokens=patches // args.spatial_merge_size**2)


def add_vision_language_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that describe a ViT beside Megatron's own, and return the parser."""
    group = parser.add_argument_group(title="vision language model")
    for flag, what in {
        "--vision-hidden-size": "Width of the ViT's layers.",
        "--vision-ffn-hidden-size": "Width of the ViT's MLPs.",
        "--vision-num-attention-heads": "Attention heads of the ViT.",
    }.items():
        group.add_argument(
            flag, type=int, help=f"{what} That of the language model where left out."
        )
    group.add_argument(
        "--spatial-merge-size",
        type=int,
        default=1,
        help="Fold squares of this many by this many patches into one token of the language model.",
    )
    group.add_argument(
        "--hf-model",
        metavar="FOLDER",
        help="The model of a Hugging Face LLaVA checkpoint, whose sizes the other flags must have; "
        "its weights come from --load, imported by scripts/import_hf.py.",
    )
    group.add_argument("--freeze-ViT", action="store_true", help="Do not train the ViT.")
    group.add_argument(
        "--max-images", type=int, default=4, help="Most images of a sample; 0 for text alone."
    )
    return parser


def hugging_face_spec(args: argparse.Namespace, model: HuggingFaceModel) -> ModelSpec:
    """The imported `model`, as the other arguments have it trained.

    Raises:
        ConfigError: an argument says otherwise than the checkpoint.
    """
    if model.architecture != "llava":
        raise ConfigError(
            f"--hf-model {args.hf_model}: holds a {model.architecture}, whose positions in three "
            "axes this script's data has not; build it from PipeWeaver's chunks"
        )
    vision, language = model.spec.modules
    for name, wanted in {
        "encoder_num_layers": vision.layers,
        "patch_dim": vision.patch_size,
        "spatial_merge_size": 1,
        "decoder_num_layers": language.layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.attention_heads,
        "untie_embeddings_and_output_weights": not language.tied_embeddings,
    }.items():
        if getattr(args, name) != wanted:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(args, name)} with --hf-model {args.hf_model}: its model has "
                f"{wanted}; give that"
            )
    if args.padded_vocab_size < (language.vocab_size or 0):
        raise ConfigError(
            f"--vocab-size {args.vocab_size} with --hf-model {args.hf_model}: its model has "
            f"{language.vocab_size} tokens; give as many"
        )
    return replace(
        model.spec,
        modules=(
            replace(vision, frozen=args.freeze_ViT),
            replace(language, vocab_size=args.padded_vocab_size),
        ),
    )


def _vision_spec(args: argparse.Namespace) -> ModuleSpec:
    heads = args.vision_num_attention_heads or args.num_attention_heads
    return ModuleSpec(
        name=VISION,
        kind=ModuleKind.VISION,
        layers=args.encoder_num_layers,
        hidden_size=args.vision_hidden_size or args.hidden_size,
        ffn_hidden_size=args.vision_ffn_hidden_size or args.ffn_hidden_size,
        attention_heads=heads,
        kv_groups=heads,
        frozen=args.freeze_ViT,
        output_size=args.hidden_size,
        projector_hidden_size=args.ffn_hidden_size,
        patch_size=args.patch_dim,
        patches_per_token=args.spatial_merge_size**2,
    )


def _language_spec(args: argparse.Namespace) -> ModuleSpec:
    grouped = args.group_query_attention
    usual = args.hidden_size // args.num_attention_heads
    return ModuleSpec(
        name=LANGUAGE,
        kind=ModuleKind.LANGUAGE,
        layers=args.decoder_num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        attention_heads=args.num_attention_heads,
        kv_groups=args.num_query_groups if grouped else args.num_attention_heads,
        after=(VISION,),
        gated_mlp=args.swiglu,
        vocab_size=args.padded_vocab_size,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        layer=LayerOptions(head_size=args.kv_channels if args.kv_channels != usual else None),
    )
