"""Tensors that a layer drops in its forward and makes again in its backward.

    norm ──► linear:         what the norm made is freed when the linear has used it
    linear ──► activation ──► linear:  so is what the activation made

The gradient of the second linear's output arrives before that linear needs its input, and has it
made again. What makes it stays Megatron's own code, fused or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

AtOnce = Callable[[], AbstractContextManager[None]]


class DroppedNorm:
    """A norm and the linear behind it; while `on`, the tensor between them is dropped.

    Args:
        norm: a norm that hands on one tensor.
        linear: the only module that reads it; returns its output and its bias.
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
        for module, forward in ((self._norm, self._make), (self._linear, self._use)):
            if on:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)

    def _make(self, hidden_SBH: Tensor) -> Tensor:
        self._again = _checkpoint()
        make = functools.partial(type(self._norm).forward, self._norm)
        normed_SBH: Tensor = self._again.checkpoint(make, hidden_SBH)
        return normed_SBH

    def _use(self, normed_SBH: Tensor) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None]
        with self._at_once():
            output = type(self._linear).forward(self._linear, normed_SBH)
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

    def _forward(self, hidden_SBH: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The MLP's forward; dense ones read no `options`."""
        del options
        mlp = self._mlp
        middle, bias = mlp.linear_fc1(hidden_SBH)
        between = SimpleNamespace(
            config=mlp.config,
            activation_func=mlp.activation_func,
            linear_fc1=_Hand(bias),
            linear_fc2=_Hand(),
        )

        def activate(middle: Tensor) -> Tensor:
            activated: Tensor = MLP.forward(between, middle)[0]
            return activated

        again = _checkpoint()
        output: tuple[Tensor, Tensor | None]
        with self._at_once():
            output = mlp.linear_fc2(again.checkpoint(activate, middle))
        again.discard_output_and_register_recompute(output[0])
        return output


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
