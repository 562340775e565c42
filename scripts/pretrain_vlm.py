"""Trains a vision-language model with Megatron's training loop, with PipeWeaver or without.

    torchrun --nproc-per-node 4 scripts/pretrain_vlm.py --pipeline-model-parallel-size 4 \
        --pipeweaver --pipeweaver-segments vision=1,language=1 ...

Takes Megatron's arguments and those of `docs/megatron.md`. Without ``--pipeweaver`` the same model
trains on one pipeline rank by Megatron's own schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from streams import sample_streams
from training_script import on_device, refuse_wrong_loss, summed_loss, train
from vlm_data import SampleOptions, Samples

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.vision_language import (
    VisionLanguage,
    add_vision_language_arguments,
)

FAMILY = VisionLanguage()


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return train(FAMILY, streams, forward_step, add_arguments)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the model, and those of its data."""
    group = add_vision_language_arguments(parser).add_argument_group(title="data")
    group.add_argument(
        "--dynamic-image-sizes",
        action="store_true",
        help="Every image has a size and a shape of its own, of at most --img-h times --img-w "
        "pixels. Needs --vision-rotary, or a Qwen2-VL.",
    )
    group.add_argument(
        "--energon",
        metavar="PATH",
        help="Train on a data set of Megatron Energon, packed (scripts/vlm_energon.py).",
    )
    group.add_argument(
        "--packing-buffer", type=int, default=64, help="Samples to choose from as --energon packs."
    )
    group.add_argument(
        "--dataloader-save",
        metavar="DIR",
        help="Write how far --energon was read beside every checkpoint, and go on from there.",
    )
    return parser


def streams(args: argparse.Namespace) -> Sequence[Any]:
    """Microbatches to train on, to validate on and to test on, each without end."""
    check_sizes(args)
    if args.energon:
        from vlm_energon import energon_streams

        return energon_streams(args, FAMILY)
    return sample_streams(args, lambda seed: Samples(sample_options(args, seed)))


def check_sizes(args: argparse.Namespace) -> None:
    """Refuse sizes that the ViT cannot take."""
    if args.dynamic_image_sizes and not FAMILY.is_rotary(args):
        raise ConfigError(
            "--dynamic-image-sizes: the ViT has learned positions for one size; add "
            "--vision-rotary, or leave it out"
        )


def sample_options(args: argparse.Namespace, seed: int) -> SampleOptions:
    """What the arguments say of samples."""
    return SampleOptions(
        seed=seed,
        sequence_length=args.seq_length,
        vocabulary=args.vocab_size,
        image_size=(args.img_h, args.img_w),
        pixels_per_token=args.patch_dim * args.spatial_merge_size,
        max_images=args.max_images,
        image_token=FAMILY.IMAGE_TOKEN,
        dynamic=args.dynamic_image_sizes,
        position_axes=FAMILY.position_axes(args),
        mock=args.mock_data,
    )


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """Megatron's forward step: one microbatch through one chunk, or through the whole model."""
    batch = on_device(next(data_iterator), but=("images",))
    return model(batch), partial(loss_of_tokens, batch)


def loss_of_tokens(
    batch: Mapping[str, torch.Tensor], losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of the tokens that count, as Megatron asks for it."""
    found = summed_loss("lm loss", losses, batch["loss_mask"])
    refuse_wrong_loss(found[0])
    return found


if __name__ == "__main__":
    sys.exit(main())
