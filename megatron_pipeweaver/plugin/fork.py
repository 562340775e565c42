"""What a fork of Megatron-LM calls that carries one of the patches of `patches/`.

There nothing of Megatron is replaced from outside: its parser, its validation and its `pretrain`
call the three functions of this file, and `get_forward_backward_func` asks for the schedule.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from megatron_pipeweaver.plugin.arguments import (
    add_pipeweaver_arguments,
    read_arguments,
)
from megatron_pipeweaver.plugin.dry_run import plan_batches
from megatron_pipeweaver.plugin.llava import Llava
from megatron_pipeweaver.plugin.providers import ModelFamily
from megatron_pipeweaver.plugin.training import (
    planner_settings,
    scheduled,
    settle,
    staged_provider,
    validation_hook,
)

__all__ = ["add_pipeweaver_arguments", "attach_pipeweaver", "validation_hook"]

FAMILY = "pipeweaver_family"
"""The attribute of a model provider that says what its model is; without it, a `LLaVAModel`."""

Provider = Callable[..., Any]


def attach_pipeweaver(
    model_provider: Provider, data_provider: Provider
) -> tuple[Provider, Provider]:
    """PipeWeaver's schedule for the rest of the process, where ``--pipeweaver`` stands.

    `pretrain` calls this once Megatron is initialised. A dry run is planned here, and ends the
    process.

    Args:
        model_provider: the script's.
        data_provider: the script's, of its data sets.

    Returns:
        What takes the place of both; the two themselves without ``--pipeweaver``.
    """
    from megatron.training import get_args, print_rank_0

    args = get_args()
    ours = read_arguments(args)
    if ours is None:
        return model_provider, data_provider
    family: ModelFamily = getattr(model_provider, FAMILY, None) or Llava()
    settings = planner_settings(args, ours, family)
    if ours.dry_run is not None:
        planned = plan_batches(ours.dry_run, args, settings, family.describe(args), data_provider)
        print_rank_0(planned)
        sys.exit()
    settle(args, settings.layout.virtual_size)
    training = contextlib.ExitStack()
    training.enter_context(scheduled(args, ours, settings, family))
    # Megatron ends a training by returning, and by leaving the process.
    atexit.register(training.close)
    return family.provider(args, settings.layout, model_provider), staged_provider(data_provider)
