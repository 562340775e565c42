"""Memory strategies at run time: what each layer of a chunk keeps for its backward.

Megatron's own recomputation and offloading are one static choice for the whole run; here they are
read at every forward and baked into that forward's graph (paper, section 5). Gradients are the
same to the last bit under all of them, dropout included: whatever runs again runs under the random
states that it ran under first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.models.dropped import (
    Dropped,
    DroppedActivation,
    DroppedInside,
    DroppedNorm,
)
from megatron_pipeweaver.models.weight_grad import WeightGradients

_DROP_NORMS = frozenset({LayerStrategy.NORM, LayerStrategy.LIGHT})
_DROP_ACTIVATIONS = frozenset({LayerStrategy.ACTIVATION, LayerStrategy.LIGHT})
_WANT_INPUT_GRADIENT = _DROP_NORMS | {LayerStrategy.RECOMPUTE, LayerStrategy.MLP}
"""Of an input without gradient, checkpointing would drop the parameters' gradients too."""


class Saver(Protocol):
    """Keeps what forwards save for their backwards somewhere else than on the device."""

    def saving(self, ignored: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Where forwards inside save all but `ignored`, one layer a call, in forward order."""


class StrategyLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's transformer layer, under the memory strategy that is set when it runs.

    Attributes:
        strategy: what the next forwards keep.
        saver: where they keep it under `LayerStrategy.OFFLOAD`.
        weight_gradients: where the layer's linears leave their weight gradients, if anywhere.
    """

    strategy = LayerStrategy.KEEP
    saver: Saver | None = None
    weight_gradients: WeightGradients | None = None

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's arguments; returns the hidden states and the cross-attention context."""
        hidden_SBH = options.pop("hidden_states", None) if not args else args[0]
        context = options.pop("context", None)
        strategy = self.strategy
        blind = strategy in _WANT_INPUT_GRADIENT and not hidden_SBH.requires_grad
        if blind or not torch.is_grad_enabled():
            strategy = LayerStrategy.KEEP

        def run(
            inner: LayerStrategy, hidden_SBH: Tensor, context: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            self._choose(inner)
            made: tuple[Tensor, Tensor | None] = super(StrategyLayer, self).forward(
                hidden_SBH, *args[1:], context=context, **options
            )
            return made

        runner = _RUNNERS.get(strategy, _run_here)
        return runner(self, functools.partial(run, strategy), hidden_SBH, context)

    def _choose(self, strategy: LayerStrategy) -> None:
        """Have the layer's parts run under `strategy`."""
        for attention in (self.self_attention, self.cross_attention):
            attention.checkpoint_core_attention = strategy is LayerStrategy.ATTENTION
        if isinstance(self.self_attention, MLASelfAttention):
            self.self_attention.recompute_up_proj = strategy is LayerStrategy.UP_PROJECTION
        # Two of them may change one module: what is kept first, then what is dropped.
        for part, on in sorted(self._droppable(strategy), key=lambda each: each[1]):
            part.turn(on)

    def _droppable(self, strategy: LayerStrategy) -> Iterator[tuple[Dropped, bool]]:
        """What can be dropped, and whether `strategy` says so."""
        mlp = self.mlp
        has_experts = isinstance(mlp, MoELayer)
        attention = self.self_attention
        latent = isinstance(attention, MLASelfAttention)
        norms = [
            (self.input_layernorm, attention if latent else attention.linear_qkv),
            (self.pre_mlp_layernorm, mlp if has_experts else mlp.linear_fc1),
        ]
        if not isinstance(self.cross_attention, IdentityOp):
            norms.append((self.pre_cross_attn_layernorm, self.cross_attention.linear_q))
        for norm, behind in norms:
            # Transformer Engine's norms are parts of the linears behind them.
            if not isinstance(norm, IdentityOp):
                yield DroppedNorm(norm, behind, self.at_once), strategy in _DROP_NORMS
        for one in _mlps(mlp):
            yield DroppedActivation(one, self.at_once), strategy in _DROP_ACTIVATIONS
        choose = functools.partial(self._choose, strategy)
        yield DroppedInside(mlp, choose, self.at_once), strategy is LayerStrategy.MLP
        if has_experts and mlp.shared_experts is not None:
            shared = DroppedInside(mlp.shared_experts, choose, self.at_once)
            yield shared, strategy is LayerStrategy.SHARED_EXPERTS

    def at_once(self) -> AbstractContextManager[None]:
        """Forwards inside have their backwards compute weight gradients themselves."""
        gradients = self.weight_gradients
        return nullcontext() if gradients is None else gradients.at_once()


_Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
_Result = tuple[Tensor, Tensor | None]


def _run_here(
    layer: StrategyLayer, run: _Run, hidden_SBH: Tensor, context: Tensor | None
) -> _Result:
    return run(hidden_SBH, context)


def _run_again(
    layer: StrategyLayer, run: _Run, hidden_SBH: Tensor, context: Tensor | None
) -> _Result:
    """Keep the input alone, and run the forward again in front of the backward."""

    def at_once(hidden_SBH: Tensor, context: Tensor | None) -> _Result:
        # What was dropped must not be held again until a weight gradient of its own.
        with layer.at_once():
            return run(hidden_SBH, context)

    output: _Result = tensor_parallel.checkpoint(at_once, False, hidden_SBH, context)
    return output


def _run_offloaded(
    layer: StrategyLayer, run: _Run, hidden_SBH: Tensor, context: Tensor | None
) -> _Result:
    """Have what is saved wait in host memory; parameters are on the device anyway."""
    if layer.saver is None:
        raise ConfigError(
            f"layer {layer.layer_number}: strategy {LayerStrategy.OFFLOAD.value!r} and nowhere to "
            "offload to; set the chunk's strategy with a saver"
        )
    with layer.at_once(), layer.saver.saving(layer.parameters()):
        return run(hidden_SBH, context)


_RUNNERS: Mapping[
    LayerStrategy, Callable[[StrategyLayer, _Run, Tensor, Tensor | None], _Result]
] = {
    LayerStrategy.RECOMPUTE: _run_again,
    LayerStrategy.OFFLOAD: _run_offloaded,
}
"""How a layer runs where Megatron's own code does not do what the strategy says."""


def check_strategies(strategies: Iterable[LayerStrategy], layers: Iterable[StrategyLayer]) -> None:
    """Returns when `layers` can run under `strategies`.

    Raises:
        ConfigError: a layer's MLP or experts are not such that can be run again.
    """
    for strategy, layer in zip(strategies, layers, strict=True):
        where = f"layer {layer.layer_number}: strategy {strategy.value!r}"
        if strategy in _DROP_ACTIVATIONS and not _mlps(layer.mlp):
            raise ConfigError(
                f"{where} runs the activation of Megatron's MLP again, and this is a "
                f"{type(layer.mlp).__name__}; plan with {LayerStrategy.NORM.value!r} instead"
            )
        if strategy is LayerStrategy.SHARED_EXPERTS and _overlaps_shared_experts(layer.mlp):
            raise ConfigError(
                f"{where} and shared experts that run beside the dispatch; drop "
                "--moe-shared-expert-overlap"
            )


def _mlps(mlp: torch.nn.Module) -> tuple[Any, ...]:
    """The MLPs of Megatron's whose activations a layer can drop: its own, or all experts'."""
    if isinstance(mlp, MoELayer):
        return tuple(mlp.experts.local_experts) if isinstance(mlp.experts, SequentialMLP) else ()
    return (mlp,) if type(mlp) is MLP else ()


def _overlaps_shared_experts(mlp: torch.nn.Module) -> bool:
    return isinstance(mlp, MoELayer) and bool(mlp.shared_expert_overlap)
