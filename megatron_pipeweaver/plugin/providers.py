"""Model providers: from Megatron's arguments to a model's specification, chunks and costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.hugging_face import HuggingFaceModel, read_model
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import initialize_by_name
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.plugin.data import DescribeMicrobatch

VISION, LANGUAGE = "vision", "language"

ChunkProvider = Callable[..., torch.nn.Module]
"""Megatron's model provider: called with `pre_process`, `post_process`, `vp_stage`, ..."""


class ModelFamily(Protocol):
    """What PipeWeaver must know of a training script's model."""

    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """The modules that Megatron's arguments describe; `ConfigError` where they do not fit."""
        ...

    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """A full microbatch, by which modules are cut and sub-microbatches sized."""
        ...

    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """Reads the metadata off a microbatch of the script's data iterator."""
        ...

    def provider(
        self, args: argparse.Namespace, layout: ChunkLayout, original: ChunkProvider | None
    ) -> ChunkProvider:
        """What takes the place of the script's model provider, and makes one chunk per call."""
        ...


class VisionLanguage:
    """A ViT and a language model of PipeWeaver's chunks; a `ModelFamily`.

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

    def provider(
        self, args: argparse.Namespace, layout: ChunkLayout, original: ChunkProvider | None = None
    ) -> ChunkProvider:
        """Makes the rank's chunks at the first call, and hands out one per call."""
        del original
        return ChunkSeries(
            lambda groups: build_chunks(
                self.spec(args), layout, vision_language_options(args), pg_collection=groups
            )
        )

    def whole(self, args: argparse.Namespace, pg_collection: Any = None) -> WholeModel:
        """The same model in one piece, for one pipeline rank and Megatron's own schedule.

        Raises:
            ConfigError: the job has several pipeline ranks.
        """
        if args.pipeline_model_parallel_size > 1:
            raise ConfigError(
                f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: the model "
                "is cut for pipelines by PipeWeaver; add --pipeweaver"
            )
        spec = self.spec(args)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        layout = make_layout(spec, 1, {})
        return WholeModel(
            build_chunks(spec, layout, vision_language_options(args), pg_collection=groups)
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


def model_options(args: argparse.Namespace) -> ModelOptions:
    """How chunks are made, from Megatron's arguments.

    With ``--use-cpu-initialization`` every parameter starts from a value that its name and
    ``--seed`` determine, however the model is cut; else from Megatron's own random states.
    """
    plain = {"sequence_parallel": False, "context_parallel_size": 1, "tp_comm_overlap": False}
    return ModelOptions(
        params_dtype=args.params_dtype,
        dropout=args.hidden_dropout,
        max_sequence_length=args.max_position_embeddings,
        image_size=args.img_h,
        image_token_id=VisionLanguage.IMAGE_TOKEN,
        position_embedding=args.position_embedding_type,
        rotary_base=args.rotary_base,
        transformer_engine=args.transformer_impl == "transformer_engine",
        common=config_fields(args),
        overrides={
            VISION: plain,
            # A projector has no heads; Megatron wants as many as tensor-parallel ranks.
            f"{VISION}_projection": {
                **plain,
                "num_attention_heads": args.tensor_model_parallel_size,
            },
            LANGUAGE: {"kv_channels": args.kv_channels},
        },
        initialize=(
            partial(initialize_by_name, seed=args.seed) if args.use_cpu_initialization else None
        ),
    )


def vision_language_options(args: argparse.Namespace) -> ModelOptions:
    """`model_options`, with what an imported model does otherwise."""
    options = model_options(args)
    if args.hf_model is None:
        return options
    theirs = read_model(args.hf_model, args.img_h).options
    return replace(
        options,
        class_token=theirs.class_token,
        rotary_base=theirs.rotary_base,
        overrides={
            name: {**one, **theirs.overrides[name]} for name, one in options.overrides.items()
        },
    )


_OF_ONE_MODULE = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "gated_linear_unit",
        "hidden_dropout",
        "params_dtype",
    }
)
"""Fields of `TransformerConfig` that are set for each module."""


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `TransformerConfig` that Megatron's arguments set for all modules alike.

    Functions are left out: the activation is that of each module, initialisation follows from
    ``init_method_std``. So are pipeline sizes, which every chunk has of its own.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    alone = argparse.Namespace(**vars(args))
    alone.pipeline_model_parallel_size = 1
    alone.virtual_pipeline_model_parallel_size = None
    alone.num_layers = args.decoder_num_layers
    given = core_transformer_config_from_args(alone)
    fields = {}
    for name, field in TransformerConfig.__dataclass_fields__.items():
        value = getattr(given, name)
        if name in _OF_ONE_MODULE or "pipeline" in name or callable(value):
            continue
        if value != field.default:
            fields[name] = value
    return fields


class ChunkSeries:
    """Megatron's model provider for a list of chunks: Megatron asks for them one by one.

    Args:
        build: makes all chunks of this rank, given Megatron's process groups.
    """

    def __init__(self, build: Callable[[Any], Sequence[torch.nn.Module]]) -> None:
        self._build = build
        self._chunks: Sequence[torch.nn.Module] = ()

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """The chunk of `vp_stage`; a new series begins with the first."""
        del pre_process, post_process, config  # every chunk knows its place
        index = vp_stage or 0
        if index == 0:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
            self._chunks = self._build(groups)
        return self._chunks[index]


class WholeModel(MegatronModule):  # type: ignore[misc]
    """All chunks of a model on one pipeline rank as one module; parameters keep their names.

    Args:
        chunks: one chunk per module, in forward order, the backbone last.
    """

    def __init__(self, chunks: Sequence[ModelChunk]) -> None:
        super().__init__(config=chunks[0].config)
        self._chunks = tuple(chunks)
        self.pg_collection = chunks[0].pg_collection
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = chunks[-1].share_embeddings_and_output_weights
        for chunk in chunks:
            for name, child in chunk.named_children():
                self.add_module(name, child)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is nothing in front of the whole model."""

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The weight that tied embeddings share."""
        return self._chunks[-1].shared_embedding_or_output_weight()

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """One microbatch through all modules; the loss of every token or patch [B, S]."""
        *encoders, backbone = self._chunks
        present = [one for one in encoders if one.count_items(batch)]
        backbone.set_input_tensor([one(batch) for one in present])
        backbone.set_sources([one.place.module for one in present])
        losses: torch.Tensor = backbone(batch)
        return losses


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
