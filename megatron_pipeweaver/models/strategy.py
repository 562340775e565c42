"""Memory strategies at run time: which layers of a chunk keep their activations.

Megatron's own recomputation is one static choice for the whole run; here it is read at every
forward and baked into that forward's graph (paper, section 5).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError

KEEP = "keep"
"""Every layer keeps what its backward needs."""
RECOMPUTE = "recompute"
"""Every layer keeps its input alone and runs its forward again in front of its backward."""

_FIRST_LAYERS = re.compile(r"recompute_(\d+)_of_(\d+)")


def recomputed_layers(strategy: str, layers: int) -> int:
    """How many of a chunk's `layers` layers, from the first on, `strategy` recomputes.

    Args:
        strategy: ``keep``, ``recompute``, or ``recompute_2_of_8``: the first 2 of 8 layers.
        layers: the layers of the chunk.

    Raises:
        ConfigError: there is no such strategy, or it is one of a chunk with other layers.
    """
    whole = {KEEP: 0, RECOMPUTE: layers}
    if strategy in whole:
        return whole[strategy]
    match = _FIRST_LAYERS.fullmatch(strategy)
    if match is None:
        raise ConfigError(
            f"memory strategy {strategy!r}: unknown; give {KEEP!r}, {RECOMPUTE!r} or "
            "'recompute_<layers>_of_<layers of the chunk>'"
        )
    recomputed, of = int(match[1]), int(match[2])
    if of != layers or recomputed > of:
        raise ConfigError(
            f"memory strategy {strategy!r}: does not fit a chunk of {layers} layers; "
            f"give 'recompute_<0 to {layers}>_of_{layers}'"
        )
    return recomputed


class StrategyLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's transformer layer, recomputed in its backward while `recompute` is set.

    Recomputation replays the random states, so gradients are those of a kept layer bit by bit.
    """

    recompute = False

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's arguments; returns the hidden states and the cross-attention context."""
        forward = super().forward
        hidden_SBH = options.pop("hidden_states", None) if not args else args[0]
        context = options.pop("context", None)

        def run(hidden_SBH: Tensor, context: Tensor | None) -> Any:
            return forward(hidden_SBH, *args[1:], context=context, **options)

        # Of an input without gradient, checkpointing would drop the parameters' gradients too.
        if self.recompute and torch.is_grad_enabled() and hidden_SBH.requires_grad:
            output: tuple[Tensor, Tensor | None] = tensor_parallel.checkpoint(
                run, False, hidden_SBH, context
            )
        else:
            output = run(hidden_SBH, context)
        return output
