"""What the training scripts have in common: one run of Megatron's training loop, and its end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see megatron_pipeweaver.plugin.cpu

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError
from megatron_pipeweaver.plugin.providers import ChunkFamily, WholeModel
from megatron_pipeweaver.plugin.training import megatron_training, run_pretrain


def train(
    family: ChunkFamily,
    streams: Callable[[argparse.Namespace], Sequence[Any]],
    forward_step: Callable[[Any, torch.nn.Module], tuple[Any, Any]],
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> int:
    """Train `family`'s model as the command line says; returns the exit code.

    Args:
        family: what the model is. Without ``--pipeweaver`` it is in one piece, on one pipeline
            rank.
        streams: makes the microbatches to train on, to validate on and to test on.
        forward_step: one microbatch through one chunk, or through the whole model.
        add_arguments: adds the script's own flags to Megatron's parser.
    """

    def model_provider(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> WholeModel:
        from megatron.training import get_args

        del pre_process, post_process, vp_stage, config
        return family.whole(get_args(), pg_collection)

    def data_provider(train_valid_test_num_samples: Sequence[int]) -> Sequence[Any]:
        from megatron.training import get_args

        del train_valid_test_num_samples
        return streams(get_args())

    data_provider.is_distributed = True  # type: ignore[attr-defined]
    # Where Megatron is a fork that calls PipeWeaver itself (`patches/`).
    model_provider.pipeweaver_family = family  # type: ignore[attr-defined]
    try:
        with megatron_training(family):
            run_pretrain(
                data_provider,
                forward_step,
                model_provider,
                extra_args_provider=add_arguments,
                args_defaults={"tokenizer_type": "NullTokenizer", "dataloader_type": "external"},
            )
    except PipeWeaverError as error:
        # What is wrong with the arguments is wrong on every rank alike.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def on_device(batch: Mapping[str, Any], but: Collection[str] = ()) -> dict[str, Any]:
    """The microbatch's tensors, one per item or one for all, on this rank's device.

    Args:
        batch: the microbatch.
        but: what stays where it is, to be taken from there by the few passes that work on it, each
            on a part: every pass of a microbatch comes by here.
    """
    return {name: one if name in but else _moved(one) for name, one in batch.items()}


def _moved(tensors: Any) -> Any:
    if isinstance(tensors, torch.Tensor):
        return tensors.cuda(non_blocking=True)
    return tuple(one.cuda(non_blocking=True) for one in tensors)


def summed_loss(
    name: str, losses: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """What Megatron asks of a loss function.

    Args:
        name: of the loss in Megatron's log.
        losses: of every token or patch.
        mask: 1 where a loss counts, and 0 elsewhere; as large.

    Returns:
        The summed loss, how many it is of, and both for Megatron's log.
    """
    total, count = (losses.float() * mask).sum(), mask.sum()
    record = torch.stack([total.detach().clone(), count])  # Megatron divides the loss in place
    return total, count.to(torch.int), {name: record}


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
