"""Where a stage's autograd graph begins: input gradients are caught, inputs are not held.

A leaf would hold the tensor that came in for as long as its gradient is awaited. Here the graph
begins at a node that hands the tensor on and keeps nothing of it; what needs it saves it, under
whatever memory strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Entry:
    """The inputs of one stage pair, from its forward to its backward.

    Args:
        inputs: what came in.
        wanted: for each of them, whether its producer wants a gradient.
    """

    def __init__(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self._wanted = tuple(wanted)
        self._forms = tuple((one.shape, one.dtype, one.device) for one in inputs)
        self._caught: list[Tensor | None] = [None] * len(inputs)

    def begin(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`inputs`, cut off from their senders' graphs; the wanted ones begin a graph here."""
        anchor = torch.empty(0, requires_grad=True)
        begin: Callable[..., Tensor] = _Begin.apply
        return tuple(
            begin(anchor, one, self._caught, index) if wanted else one.detach()
            for index, (one, wanted) in enumerate(zip(inputs, self._wanted, strict=True))
        )

    def grads(self) -> tuple[Tensor | None, ...]:
        """What the backward has brought, in the order of the inputs; `None` where not wanted."""
        return tuple(self._caught)

    def zeros(self) -> tuple[Tensor, ...]:
        """Zeros like the inputs."""
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in self._forms
        )


class _Begin(torch.autograd.Function):
    """Hands on a tensor that has no gradient of its own; `anchor` makes it part of a graph."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, tensor: Tensor, caught: list[Tensor | None], index: int
    ) -> Tensor:
        del anchor
        ctx.caught, ctx.index, ctx.strides = caught, index, tensor.stride()
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (grad,) = grads
        if grad.stride() != ctx.strides:
            # Laid out like the input, as a leaf's gradient is: products depend on it.
            laid_out = grad.new_empty_strided(grad.shape, ctx.strides)
            grad = laid_out.copy_(grad)
        ctx.caught[ctx.index] = grad
        return (None,) * 4
