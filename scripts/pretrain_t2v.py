"""Trains a text-to-video model with Megatron's training loop, with PipeWeaver or without.

    torchrun --nproc-per-node 4 scripts/pretrain_t2v.py --pipeline-model-parallel-size 4 \
        --pipeweaver --pipeweaver-segments text=1,video=2 ...

Takes Megatron's arguments and those of `docs/models.md`. Without ``--pipeweaver`` the same model
trains on one pipeline rank by Megatron's own schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from streams import sample_streams
from t2v_data import ClipOptions, ClipSamples
from training_script import on_device, refuse_wrong_loss, summed_loss, train

from megatron_pipeweaver.plugin.text_to_video import TextToVideo, add_text_to_video_arguments


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return train(TextToVideo(), streams, forward_step, add_text_to_video_arguments)


def streams(args: argparse.Namespace) -> Sequence[Any]:
    """Microbatches to train on, to validate on and to test on, each without end."""
    return sample_streams(args, lambda seed: ClipSamples(clip_options(args, seed)))


def clip_options(args: argparse.Namespace, seed: int) -> ClipOptions:
    """What the arguments say of clips."""
    patches_of_a_frame = (args.img_h // args.patch_dim) * (args.img_w // args.patch_dim)
    return ClipOptions(
        seed=seed,
        frames=args.seq_length // patches_of_a_frame,
        height=args.img_h,
        width=args.img_w,
        channels=args.latent_channels,
        max_clips=args.max_clips,
        prompt_length=args.prompt_length,
        vocabulary=args.vocab_size,
        mock=args.mock_data,
    )


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """Megatron's forward step: one microbatch through one chunk, or through the whole model."""
    return model(on_device(next(data_iterator), but=("clips", "noise"))), loss_of_patches


def loss_of_patches(
    losses: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of all patches, as Megatron asks for it."""
    found = summed_loss("video loss", losses, torch.ones_like(losses, dtype=torch.float32))
    refuse_wrong_loss(found[0])
    return found


if __name__ == "__main__":
    sys.exit(main())
