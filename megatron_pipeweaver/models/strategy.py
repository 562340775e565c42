"""Memory strategies at run time: which layers of a chunk keep their activations.

Megatron's own recomputation is one static choice for the whole run; here it is read at every
forward and baked into that forward's graph (paper, section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies

RUNS = (LayerStrategy.KEEP, LayerStrategy.RECOMPUTE)
"""What a layer can do at run time."""


def recomputed_layers(name: str, layers: int) -> tuple[bool, ...]:
    """Which of a chunk's `layers` layers strategy `name` recomputes (names: `ir.strategy`).

    Raises:
        ConfigError: there is no such strategy, or it is one of a chunk with other layers, or a
            layer does what it cannot do at run time.
    """
    found = layer_strategies(name, layers)
    for one in found:
        if one not in RUNS:
            raise ConfigError(
                f"memory strategy {name!r}: layers cannot {one.value!r} at run time; "
                f"plan with {[each.value for each in RUNS]}"
            )
    return tuple(one is LayerStrategy.RECOMPUTE for one in found)


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
