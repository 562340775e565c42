"""Text-to-video models from Megatron's arguments: a text encoder and a diffusion transformer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, final

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, Modulation, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.plugin.data import DescribeMicrobatch
from megatron_pipeweaver.plugin.providers import (
    ChunkFamily,
    add_encoder_sizes,
    encoder_sizes,
    model_options,
    refuse_language_layers,
    refuse_missing_layers,
    refuse_other_models,
)

TEXT, VIDEO = "text", "video"


@final
class TextToVideo(ChunkFamily):
    """A text encoder and a diffusion transformer.

    Microbatches are those of `models.diffusion`: ``clips``, ``noise``, ``timesteps``, ``prompts``.
    """

    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """The modules; Megatron's own sizes are those of the diffusion transformer."""
        _check(args)
        return ModelSpec(name="t2v", modules=(_text_spec(args), _video_spec(args)))

    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """A full microbatch, with half as many clips as there may be."""
        return _filled(args, max(1, args.max_clips // 2))

    def expected(self, args: argparse.Namespace) -> Sequence[MicrobatchMetadata]:
        """Full microbatches of one clip up to as many as there may be, all of one length."""
        return [_filled(args, clips) for clips in range(1, args.max_clips + 1)]

    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """Reads shapes."""
        patch = args.patch_dim

        def read(microbatch: Mapping[str, Any]) -> MicrobatchMetadata:
            shapes = (clip.shape for clip in microbatch["clips"])
            patches = tuple(t * (y // patch) * (x // patch) for _, t, y, x in shapes)
            prompts = tuple(Item(units=len(one), tokens=len(one)) for one in microbatch["prompts"])
            return MicrobatchMetadata(
                sequence_length=sum(patches),
                document_lengths=patches,
                items={TEXT: prompts} if prompts else {},
            )

        return read

    def options(self, args: argparse.Namespace) -> ModelOptions:
        """How chunks are made; norms and biases of the arguments are the text encoder's."""
        return model_options(
            args,
            {
                f"{TEXT}_projection": {"num_attention_heads": args.tensor_model_parallel_size},
                VIDEO: {
                    "kv_channels": args.kv_channels,
                    "normalization": "LayerNorm",
                    "add_bias_linear": True,
                },
            },
        )


def add_text_to_video_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that describe a text-to-video model beside Megatron's own; returns the parser.

    Megatron's ``--encoder-num-layers`` are the text encoder's, ``--decoder-num-layers`` the
    diffusion transformer's, ``--seq-length`` is the most patches of a microbatch's clips, and
    ``--img-h``, ``--img-w`` and ``--patch-dim`` are sizes in latents.
    """
    group = parser.add_argument_group(title="text to video model")
    add_encoder_sizes(group, TEXT, "text encoder", "transformer")
    group.add_argument(
        "--text-num-query-groups",
        type=int,
        help="Query groups of the text encoder. As many as heads where left out.",
    )
    group.add_argument(
        "--freeze-text-encoder", action="store_true", help="Do not train the text encoder."
    )
    group.add_argument(
        "--modulation",
        choices=[one.value for one in Modulation],
        default=Modulation.TABLE.value,
        help="Shifts, scales and gates by a linear of every layer (DiT), or by a table of every "
        "layer and one linear for all (Wan2.1).",
    )
    group.add_argument(
        "--latent-channels", type=int, default=16, help="Channels of a clip's latents."
    )
    group.add_argument("--max-clips", type=int, default=8, help="Most clips of a microbatch.")
    group.add_argument(
        "--prompt-length", type=int, default=256, help="Most tokens of a clip's prompt."
    )
    return parser


def _filled(args: argparse.Namespace, clips: int) -> MicrobatchMetadata:
    """A microbatch of so many clips that fill the sequence, each with a prompt."""
    length = max(1, args.seq_length // clips)
    item = Item(units=args.prompt_length, tokens=args.prompt_length)
    return MicrobatchMetadata(
        sequence_length=length * clips,
        document_lengths=(length,) * clips,
        items={TEXT: (item,) * clips},
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not fit, by flag."""
    refuse_missing_layers(args, "text encoder", "transformer")
    if args.micro_batch_size != 1:
        raise ConfigError(
            f"--micro-batch-size {args.micro_batch_size}: a microbatch is one row of clips; "
            "give --micro-batch-size 1"
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size {args.context_parallel_size}: text-to-video chunks run whole "
            "rows; give --context-parallel-size 1"
        )
    refuse_language_layers(args, "text-to-video chunks")
    refuse_other_models(args)
    if getattr(args, "window_size", None):
        raise ConfigError(
            f"--window-size {args.window_size}: clips and prompts attend to themselves as a whole; "
            "leave it out"
        )
    if args.sequence_parallel:
        raise ConfigError("--sequence-parallel: text-to-video chunks run without it; leave it out")
    frame = (args.img_h // args.patch_dim) * (args.img_w // args.patch_dim)
    if args.img_h % args.patch_dim or args.img_w % args.patch_dim or frame > args.seq_length:
        raise ConfigError(
            f"--img-h {args.img_h} --img-w {args.img_w}: must be multiples of --patch-dim "
            f"{args.patch_dim}, and one frame's patches not more than --seq-length "
            f"{args.seq_length}"
        )
    if args.prompt_length > args.max_position_embeddings:
        raise ConfigError(
            f"--prompt-length {args.prompt_length}: is more than --max-position-embeddings "
            f"{args.max_position_embeddings}; raise that"
        )


def _text_spec(args: argparse.Namespace) -> ModuleSpec:
    sizes = encoder_sizes(args, TEXT)
    return ModuleSpec(
        name=TEXT,
        kind=ModuleKind.TEXT,
        **sizes,
        kv_groups=args.text_num_query_groups or sizes["attention_heads"],
        frozen=args.freeze_text_encoder,
        gated_mlp=args.swiglu,
        vocab_size=args.padded_vocab_size,
    )


def _video_spec(args: argparse.Namespace) -> ModuleSpec:
    usual = args.hidden_size // args.num_attention_heads
    text = args.text_hidden_size or args.hidden_size
    return ModuleSpec(
        name=VIDEO,
        kind=ModuleKind.DIFFUSION,
        layers=args.decoder_num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        attention_heads=args.num_attention_heads,
        kv_groups=args.num_attention_heads,
        after=(TEXT,),
        input_size=text,
        patch_size=args.patch_dim,
        image_channels=args.latent_channels,
        layer=LayerOptions(
            head_size=args.kv_channels if args.kv_channels != usual else None,
            context_size=args.hidden_size,
            modulation=Modulation(args.modulation),
            qk_norm=args.qk_layernorm,
        ),
    )
