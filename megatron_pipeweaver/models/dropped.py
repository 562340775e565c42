"""Tensors that a layer drops in its forward and makes again in its backward.

    norm ──► linear:         what the norm made is freed when the linear has used it
    linear ──► activation ──► linear:  so is what the activation made
    ──► MLP, experts:        what is made inside is, but not what comes in

The gradient of the second linear's output arrives before that linear needs its input, and has it
made again. What makes it stays Megatron's own code, fused or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

AtOnce = Callable[[], AbstractContextManager[None]]


class Dropped(Protocol):
    """Something that a layer drops, or keeps."""

    def turn(self, on: bool) -> None:
        """Drop, or keep, in the forwards that come; the forwards of a few modules change."""


class DroppedNorm:
    """A norm and the linear behind it; while `on`, the tensor between them is dropped.

    Args:
        norm: a norm that hands on one tensor.
        linear: the only module that reads it, be it experts or latent attention; returns its output
            and its bias.
        at_once: inside, a linear's backward computes its weight gradient itself, for what was
            dropped must not be held again until that gradient has an op of its own.
    """

    def __init__(self, norm: torch.nn.Module, linear: torch.nn.Module, at_once: AtOnce) -> None:
        self._norm = norm
        self._linear = linear
        self._at_once = at_once
        self._again: Any = None

    def turn(self, on: bool) -> None:
        """Drop, or keep, in the forwards that come; these modules' forwards alone change."""
        self._norm.forward = self._make if on else self._keep
        if on:
            self._linear.forward = self._use
        else:
            self._linear.__dict__.pop("forward", None)

    def _keep(self, hidden_SBH: Tensor) -> Tensor:
        # An RMS norm that is not fused reads its input twice. Its two gradients are added up
        # before they meet that of the residual, as they are where the norm runs again.
        normed_SBH: Tensor = type(self._norm).forward(self._norm, hidden_SBH.view_as(hidden_SBH))
        return normed_SBH

    def _make(self, hidden_SBH: Tensor) -> Tensor:
        self._again = _checkpoint()
        make = functools.partial(type(self._norm).forward, self._norm)
        normed_SBH: Tensor = self._again.checkpoint(make, hidden_SBH)
        return normed_SBH

    def _use(self, normed_SBH: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None]
        with self._at_once():
            output = type(self._linear).forward(self._linear, normed_SBH, **options)
        self._again.discard_output_and_register_recompute(output[0])
        self._again = None
        return output


class DroppedActivation:
    """The activation of Megatron's `MLP`; while on, what it makes is dropped.

    The first linear's output is kept for it.

    Args:
        mlp: the MLP.
        at_once: as in `DroppedNorm`, for its second linear.
    """

    def __init__(self, mlp: Any, at_once: AtOnce) -> None:
        self._mlp = mlp
        self._at_once = at_once

    def turn(self, on: bool) -> None:
        """Drop, or keep, in the forwards that come."""
        if on:
            self._mlp.forward = self._forward
        else:
            self._mlp.__dict__.pop("forward", None)

    def _forward(
        self, hidden_SBH: Tensor, per_token_scale: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The MLP's forward, and an expert's, which scales its rows; `options` are not read."""
        del options
        mlp = self._mlp
        middle, bias = mlp.linear_fc1(hidden_SBH)
        between = SimpleNamespace(
            config=mlp.config,
            activation_func=mlp.activation_func,
            linear_fc1=_Hand(bias),
            linear_fc2=_Hand(),
        )

        def activate(middle: Tensor, scale: Tensor | None) -> Tensor:
            activated: Tensor = MLP.forward(between, middle, scale)[0]
            return activated

        again = _checkpoint()
        with self._at_once():
            output, bias = mlp.linear_fc2(again.checkpoint(activate, middle, per_token_scale))
        again.discard_output_and_register_recompute(output)
        if per_token_scale is not None and bias is not None:
            return output + bias.unsqueeze(0) * per_token_scale.unsqueeze(-1), None
        return output, bias


class DroppedInside:
    """A module whose input alone stays: all that it makes inside is made again.

    Args:
        module: an MLP, or experts.
        prepare: called in front of each run; what is inside must be set as it was the first time.
        at_once: as in `DroppedNorm`, for all linears inside.
    """

    def __init__(
        self, module: torch.nn.Module, prepare: Callable[[], None], at_once: AtOnce
    ) -> None:
        self._module = module
        self._prepare = prepare
        self._at_once = at_once

    def turn(self, on: bool) -> None:
        """Drop, or keep, in the forwards that come."""
        if on:
            self._module.forward = self._forward
        else:
            self._module.__dict__.pop("forward", None)

    def _forward(self, hidden_SBH: Tensor, **options: Any) -> Any:
        """What the module's own forward returns: its output, beside which there may be a bias."""
        beside: list[Tensor | None] = []

        def run(hidden_SBH: Tensor) -> Tensor:
            self._prepare()
            with self._at_once():
                made = type(self._module).forward(self._module, hidden_SBH, **options)
            # A bias is a parameter. Handed through a checkpoint it would become what that made,
            # and the next backward would run without end.
            first, *beside[:] = made if isinstance(made, tuple) else (made,)
            output: Tensor = first
            return output

        output: Tensor = tensor_parallel.checkpoint(run, False, hidden_SBH)
        return (output, *beside) if beside else output


class _Hand(torch.nn.Module):
    """A linear that hands on what it gets, with the bias of another one."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self._bias = (bias,)  # in a tuple, for it is no parameter of this module

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return hidden, self._bias[0]


def _checkpoint() -> Any:
    # Anything but None makes it ask Transformer Engine for its fp8 state, which need not be there.
    return CheckpointWithoutOutput(fp8=None)
