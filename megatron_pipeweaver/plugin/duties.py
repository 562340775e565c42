"""What a schedule function owes Megatron around an iteration: refusals, timer, syncs, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_pipeweaver.errors import UnsupportedMegatronError
from megatron_pipeweaver.plugin import compat

UNSUPPORTED_OPTIONS: Mapping[str, str] = {
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "defer_embedding_wgrad_compute": "--defer-embedding-wgrad-compute",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
}
"""Megatron options that assume an order of microbatches, by `TransformerConfig` field."""


def refuse_unsupported(config: Any, adjust_tensor_shapes_fn: Any) -> None:
    """Refuse, by name, Megatron options that assume Megatron's own schedules.

    Raises:
        UnsupportedMegatronError: one of them is on.
    """
    for field, flag in UNSUPPORTED_OPTIONS.items():
        if getattr(config, field, False):
            raise UnsupportedMegatronError(
                f"{flag}: PipeWeaver orders the microbatches itself; leave the flag out"
            )
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise UnsupportedMegatronError(
            f"--cuda-graph-impl {config.cuda_graph_impl}: every iteration has another schedule, "
            "which a graph cannot replay; leave the flag out"
        )
    if adjust_tensor_shapes_fn is not None:
        raise UnsupportedMegatronError(
            "adjust_tensor_shapes_fn: plans know every shape from the batch's metadata; "
            "call without it"
        )


def finish_gradients(
    chunks: Sequence[Any],
    config: Any,
    num_tokens: torch.Tensor,
    groups: Any,
    force_all_reduce: bool | None,
) -> None:
    """Reduce gradients over replicas and finalise them, zero-work chunks included.

    Collectives start in the order of the chunk list on every replica, whatever its schedule was.
    """
    if config.finalize_model_grads_func is None:
        return
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False):
            # Group by group, since DDP's own loop forgets what must be reduced as a whole.
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.start_grad_sync(force_all_reduce=force_all_reduce)
    config.finalize_model_grads_func(
        compat.finalize_order(chunks),
        num_tokens if config.calculate_per_token_loss else None,
        pg_collection=groups,
        force_all_reduce=force_all_reduce,
    )


@contextlib.contextmanager
def timed(config: Any) -> Any:
    """Megatron's ``forward-backward`` timer around the iteration."""
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    yield
    if config.timers is not None:
        config.timers("forward-backward").stop()


@contextlib.contextmanager
def no_gradient_sync(config: Any) -> Any:
    """Every chunk's ``no_sync``, so that no backward hook starts a collective of its own."""
    functions = config.no_sync_func
    if functions is None:
        functions = []
    elif not isinstance(functions, list):
        functions = [functions]
    with contextlib.ExitStack() as stack:
        for function in functions:
            stack.enter_context(function())
        yield
