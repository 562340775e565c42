"""Vision-language models from Megatron's arguments: a ViT and a language model."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import (
    ExpertOptions,
    LatentOptions,
    LayerOptions,
    ModelSpec,
    ModuleKind,
    ModuleSpec,
)
from megatron_pipeweaver.models.hugging_face import HuggingFaceModel, read_model
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.plugin.data import DescribeMicrobatch
from megatron_pipeweaver.plugin.providers import (
    ChunkFamily,
    add_encoder_sizes,
    encoder_sizes,
    expert_fields,
    latent_fields,
    model_options,
    refuse_language_layers,
    refuse_missing_layers,
    refuse_other_models,
)
from megatron_pipeweaver.semu.from_megatron import expert_layers, window_layers

VISION, LANGUAGE = "vision", "language"


@final
class VisionLanguage(ChunkFamily):
    """A ViT and a language model.

    Microbatches hold ``images``, a tensor [items, C, Y, X] or one [C, Y, X] each, and ``tokens``,
    ``labels``, ``loss_mask`` and ``position_ids`` [B, S], an image's place in the tokens filled
    with `IMAGE_TOKEN`. Under M-RoPE, ``position_ids`` are [3, B, S] (`models.positions`).
    """

    IMAGE_TOKEN = DEFAULT_IMAGE_TOKEN_INDEX

    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """The modules; widths of the ViT are the language model's where no flag gives them."""
        refuse_missing_layers(args, "ViT", "language model")
        refuse_other_models(args)
        imported = _imported(args)
        if imported is not None:
            spec = hugging_face_spec(args, imported)
        else:
            spec = ModelSpec(name="vlm", modules=(_vision_spec(args), _language_spec(args)))
        _check_images(args, rotary=bool(spec.module(VISION).layer.rotary))
        return spec

    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """A microbatch whose samples show half of the images that they may, in full size."""
        return _showing(args, max(1, args.max_images * args.micro_batch_size // 2))

    def expected(self, args: argparse.Namespace) -> Sequence[MicrobatchMetadata]:
        """From no image to all that the samples may show, in full size."""
        return [
            _showing(args, count) for count in range(args.max_images * args.micro_batch_size + 1)
        ]

    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """Reads shapes."""
        item = functools.cache(functools.partial(_item, args))

        def read(microbatch: Mapping[str, Any]) -> MicrobatchMetadata:
            samples, length = microbatch["tokens"].shape
            images = tuple(item(*one.shape[-2:]) for one in microbatch.get("images", ()))
            documents = microbatch.get("cu_seqlens")
            return MicrobatchMetadata(
                sequence_length=length,
                samples=samples,
                items={VISION: images} if images else {},
                document_lengths=() if documents is None else tuple(documents.diff().tolist()),
            )

        return read

    def options(self, args: argparse.Namespace) -> ModelOptions:
        """How chunks are made, with what an imported model does otherwise."""
        plain = {"sequence_parallel": False, "context_parallel_size": 1, "tp_comm_overlap": False}
        # A projector has no heads; Megatron wants as many as tensor-parallel ranks.
        heads = {"num_attention_heads": args.tensor_model_parallel_size}
        # Fused rotary embeddings count every packed sequence from 0.
        unfused = {"apply_rope_fusion": False}
        # A window would let a patch see those in front of it alone.
        whole = {"window_size": None}
        overrides: Mapping[str, Mapping[str, Any]] = {
            VISION: {**plain, **unfused, **whole},
            f"{VISION}_projection": {**plain, **heads},
            LANGUAGE: {
                "kv_channels": args.kv_channels,
                **expert_fields(args),
                **latent_fields(args),
                **(unfused if self.position_axes(args) > 1 else {}),
            },
        }
        options = replace(model_options(args, overrides), image_token_id=self.IMAGE_TOKEN)
        imported = _imported(args)
        if imported is None:
            return options
        theirs = imported.options
        return replace(
            options,
            class_token=theirs.class_token,
            position_embedding=theirs.position_embedding,
            rotary_base=theirs.rotary_base,
            overrides={name: {**one, **theirs.overrides[name]} for name, one in overrides.items()},
        )

    def position_axes(self, args: argparse.Namespace) -> int:
        """Of a token's position: 3 under M-RoPE, else 1."""
        imported = _imported(args)
        kind = (
            args.position_embedding_type
            if imported is None
            else imported.options.position_embedding
        )
        return 3 if kind == "mrope" else 1

    def is_rotary(self, args: argparse.Namespace) -> bool:
        """Whether patches turn by their place, so that images may have any size."""
        return bool(self.spec(args).module(VISION).layer.rotary)


def _imported(args: argparse.Namespace) -> HuggingFaceModel | None:
    """The model of ``--hf-model``, if it is given."""
    return None if args.hf_model is None else read_model(args.hf_model, args.img_h)


def _item(args: argparse.Namespace, height: int, width: int) -> Item:
    """An image of so many pixels."""
    patches = (height // args.patch_dim) * (width // args.patch_dim)
    imported = _imported(args)
    class_tokens = int(imported is not None and imported.options.class_token)
    return Item(units=patches + class_tokens, tokens=patches // args.spatial_merge_size**2)


def _showing(args: argparse.Namespace, images: int) -> MicrobatchMetadata:
    """A microbatch that shows so many images, in full size."""
    return MicrobatchMetadata(
        sequence_length=args.seq_length,
        samples=args.micro_batch_size,
        items={VISION: (_item(args, args.img_h, args.img_w),) * images},
    )


def _check_images(args: argparse.Namespace, *, rotary: bool) -> None:
    """Refuse images that the ViT cannot take."""
    given = f"--img-h {args.img_h} --img-w {args.img_w}"
    if args.img_h != args.img_w and not rotary:
        raise ConfigError(
            f"{given}: a ViT of learned positions takes square images; give both the same size, "
            "or --vision-rotary"
        )
    side = args.patch_dim * args.spatial_merge_size
    if args.img_h % side or args.img_w % side:
        raise ConfigError(
            f"{given}: must be multiples of {side}, which is --patch-dim {args.patch_dim} times "
            f"--spatial-merge-size {args.spatial_merge_size}"
        )


def add_vision_language_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that describe a ViT beside Megatron's own, and return the parser."""
    group = parser.add_argument_group(title="vision language model")
    add_encoder_sizes(group, VISION, "ViT", "language model")
    group.add_argument(
        "--spatial-merge-size",
        type=int,
        default=1,
        help="Fold squares of this many by this many patches into one token of the language model.",
    )
    group.add_argument(
        "--hf-model",
        metavar="FOLDER",
        help="The model of a Hugging Face LLaVA or Qwen2-VL checkpoint, whose sizes the other "
        "flags must have; its weights come from --load, imported by scripts/import_hf.py.",
    )
    group.add_argument(
        "--vision-rotary",
        action="store_true",
        help="Patches know their place by rotary embeddings of their row and column, as in "
        "Qwen2-VL, so that images may have any size. Else by learned positions, as in CLIP.",
    )
    group.add_argument(
        "--freeze-ViT",
        action="store_true",
        help="Do not train the ViT, nor the projector behind it: a frozen encoder has no backward.",
    )
    group.add_argument(
        "--max-images", type=int, default=4, help="Most images of a sample; 0 for text alone."
    )
    return parser


def hugging_face_spec(args: argparse.Namespace, model: HuggingFaceModel) -> ModelSpec:
    """The imported `model`, as the other arguments have it trained.

    Raises:
        ConfigError: an argument says otherwise than the checkpoint.
    """
    refuse_language_layers(args, "an imported model's layers")
    vision, language = model.spec.modules
    for name, wanted in {
        "encoder_num_layers": vision.layers,
        "patch_dim": vision.patch_size,
        "spatial_merge_size": math.isqrt(vision.patches_per_token),
        "decoder_num_layers": language.layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.attention_heads,
        "untie_embeddings_and_output_weights": not language.tied_embeddings,
        "qk_layernorm": False,
        "window_size": None,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
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
            f"{language.vocab_size} tokens; give as many, or --padded-vocab-size"
        )
    return replace(
        model.spec,
        modules=(
            replace(vision, frozen=args.freeze_ViT),
            replace(language, vocab_size=args.padded_vocab_size),
        ),
    )


def _vision_spec(args: argparse.Namespace) -> ModuleSpec:
    sizes = encoder_sizes(args, VISION)
    return ModuleSpec(
        name=VISION,
        kind=ModuleKind.VISION,
        **sizes,
        kv_groups=sizes["attention_heads"],
        frozen=args.freeze_ViT,
        output_size=args.hidden_size,
        projector_hidden_size=args.ffn_hidden_size,
        patch_size=args.patch_dim,
        patches_per_token=args.spatial_merge_size**2,
        layer=LayerOptions(rotary=args.vision_rotary or None),
    )


def _language_spec(args: argparse.Namespace) -> ModuleSpec:
    grouped = args.group_query_attention
    latent = _latent(args)
    usual = args.kv_channels == args.hidden_size // args.num_attention_heads
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
        layer=LayerOptions(
            head_size=None if usual or latent is not None else args.kv_channels,
            qk_norm=args.qk_layernorm,
            latent=latent,
            experts=_experts(args),
            **window_layers(
                getattr(args, "window_size", None),
                getattr(args, "window_attn_skip_freq", None),
                args.decoder_num_layers,
                LANGUAGE,
            ),
        ),
    )


def _latent(args: argparse.Namespace) -> LatentOptions | None:
    if not args.multi_latent_attention:
        return None
    return LatentOptions(
        kv_rank=args.kv_lora_rank,
        query_rank=args.q_lora_rank,
        head_size=args.qk_head_dim,
        rotary_size=args.qk_pos_emb_head_dim,
        value_size=args.v_head_dim,
    )


def _experts(args: argparse.Namespace) -> ExpertOptions | None:
    if args.num_experts is None:
        return None
    return ExpertOptions(
        count=args.num_experts,
        active=args.moe_router_topk,
        ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        shared_ffn_hidden_size=args.moe_shared_expert_intermediate_size,
        **expert_layers(args.moe_layer_freq, args.decoder_num_layers, LANGUAGE),
    )
