"""Trains a text-to-video model with Megatron's training loop, with PipeWeaver or without.

    torchrun --nproc-per-node 4 scripts/pretrain_t2v.py --pipeline-model-parallel-size 4 \
        --pipeweaver --pipeweaver-segments text=1,video=2 ...

Takes Megatron's arguments and those of `docs/models.md`. Without ``--pipeweaver`` the same model
trains on one pipeline rank by Megatron's own schedule.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see megatron_pipeweaver.plugin.cpu

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from t2v_data import ClipOptions, ClipSamples
from vlm_data import MicrobatchStream

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError
from megatron_pipeweaver.plugin.providers import WholeModel
from megatron_pipeweaver.plugin.text_to_video import TextToVideo, add_text_to_video_arguments
from megatron_pipeweaver.plugin.training import megatron_training

FAMILY = TextToVideo()
_EVALUATION_SEED = 1 << 20
"""What evaluation's clips are drawn with beside ``--seed``, so that they are not trained on."""


def main() -> int:
    """Train as the command line says; returns the exit code."""
    try:
        with megatron_training(FAMILY):
            run()
    except PipeWeaverError as error:
        # What is wrong with the arguments is wrong on every rank alike.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"pretrain_t2v: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run() -> None:
    """Megatron's own course of things."""
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(
        extra_args_provider=add_text_to_video_arguments,
        args_defaults={"tokenizer_type": "NullTokenizer", "dataloader_type": "external"},
    )
    data_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        pretrain_cfg_container_from_args(args),
        data_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> WholeModel:
    """The model without PipeWeaver: in one piece, on one pipeline rank."""
    from megatron.training import get_args

    del pre_process, post_process, vp_stage, config
    return FAMILY.whole(get_args(), pg_collection)


def data_provider(train_valid_test_num_samples: Sequence[int]) -> list[Iterator[Any]]:
    """Microbatches to train on, to validate on and to test on, each without end."""
    from megatron.training import get_args

    del train_valid_test_num_samples
    args = get_args()
    consumed = [args.consumed_train_samples, args.consumed_valid_samples, 0]
    return [
        MicrobatchStream(
            ClipSamples(clip_options(args, args.seed + index * _EVALUATION_SEED)),
            first=first,
            size=1,
            replica=parallel_state.get_data_parallel_rank(),
            replicas=parallel_state.get_data_parallel_world_size(),
        )
        for index, first in enumerate(consumed)
    ]


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
    return model(on_device(next(data_iterator))), mean_of_patches


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The microbatch's tensors, one per clip or one for all, on this rank's device."""
    return {
        name: (
            tuple(each.cuda(non_blocking=True) for each in one)
            if isinstance(one, tuple)
            else one.cuda(non_blocking=True)
        )
        for name, one in batch.items()
    }


def mean_of_patches(
    losses: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss, how many patches it is of, and both for Megatron's log."""
    total = losses.float().sum()
    count = torch.tensor(losses.numel(), device=losses.device)
    record = torch.stack([total.detach().clone(), count.float()])
    return total, count.to(torch.int), {"video loss": record}


if __name__ == "__main__":
    sys.exit(main())
