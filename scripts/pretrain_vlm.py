"""Trains a vision-language model with Megatron's training loop, with PipeWeaver or without.

    torchrun --nproc-per-node 4 scripts/pretrain_vlm.py --pipeline-model-parallel-size 4 \
        --pipeweaver --pipeweaver-segments vision=1,language=1 ...

Takes Megatron's arguments and those of `docs/megatron.md`. Without ``--pipeweaver`` the same model
trains on one pipeline rank by Megatron's own schedule.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see megatron_pipeweaver.plugin.cpu

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import get_rerun_state_machine
from vlm_data import MicrobatchStream, SampleOptions, Samples

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError
from megatron_pipeweaver.plugin.providers import (
    VisionLanguage,
    WholeModel,
    add_vision_language_arguments,
)
from megatron_pipeweaver.plugin.training import megatron_training, run_pretrain

FAMILY = VisionLanguage()
_EVALUATION_SEED = 1 << 20
"""What evaluation's samples are drawn with beside ``--seed``, so that they are not trained on."""


def main() -> int:
    """Train as the command line says; returns the exit code."""
    try:
        with megatron_training(FAMILY):
            run()
    except PipeWeaverError as error:
        # What is wrong with the arguments is wrong on every rank alike.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"pretrain_vlm: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run() -> None:
    """Megatron's own course of things."""
    data_provider.is_distributed = True  # type: ignore[attr-defined]
    # Where Megatron is a fork that calls PipeWeaver itself (`patches/`).
    model_provider.pipeweaver_family = FAMILY  # type: ignore[attr-defined]
    run_pretrain(
        data_provider,
        forward_step,
        model_provider,
        extra_args_provider=add_arguments,
        args_defaults={"tokenizer_type": "NullTokenizer", "dataloader_type": "external"},
    )


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the model, and those of its data."""
    group = add_vision_language_arguments(parser).add_argument_group(title="data")
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
    if args.energon:
        from vlm_energon import energon_streams

        return energon_streams(args, FAMILY)
    consumed = [args.consumed_train_samples, args.consumed_valid_samples, 0]
    return [
        MicrobatchStream(
            Samples(sample_options(args, args.seed + index * _EVALUATION_SEED)),
            first=first,
            size=args.micro_batch_size,
            replica=parallel_state.get_data_parallel_rank(),
            replicas=parallel_state.get_data_parallel_world_size(),
        )
        for index, first in enumerate(consumed)
    ]


def sample_options(args: argparse.Namespace, seed: int) -> SampleOptions:
    """What the arguments say of samples."""
    return SampleOptions(
        seed=seed,
        sequence_length=args.seq_length,
        vocabulary=args.vocab_size,
        image_size=args.img_h,
        patch_size=args.patch_dim,
        max_images=args.max_images,
        image_token=FAMILY.IMAGE_TOKEN,
        merge_size=args.spatial_merge_size,
        mock=args.mock_data,
    )


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Any, Any]:
    """Megatron's forward step: one microbatch through one chunk, or through the whole model."""
    batch = {name: one.cuda(non_blocking=True) for name, one in next(data_iterator).items()}
    return model(batch), partial(loss_of_tokens, batch)


def loss_of_tokens(
    batch: Mapping[str, torch.Tensor], losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss, how many tokens it is of, and both for Megatron's log."""
    mask = batch["loss_mask"]
    total, count = (losses.float() * mask).sum(), mask.sum()
    refuse_wrong_loss(total)
    record = torch.stack([total.detach().clone(), count])
    return total, count.to(torch.int), {"lm loss": record}


def refuse_wrong_loss(loss: torch.Tensor) -> None:
    """Show the loss to Megatron's rerun state machine, as its own scripts do.

    With ``--check-for-nan-in-loss-and-grad``, which is on unless it is turned off, a loss that is
    no number ends the job, after a second run of the iteration where ``--rerun-mode`` says so.
    """
    from megatron.training import get_args

    if not get_args().check_for_nan_in_loss_and_grad:
        return
    checks = {"NaN": torch.isnan, "Inf": torch.isinf}
    for name, check in checks.items():
        get_rerun_state_machine().validate_result(
            result=loss.detach().clone(),  # Megatron divides the loss in place
            rejection_func=check,
            message=f"found {name} in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )


if __name__ == "__main__":
    sys.exit(main())
