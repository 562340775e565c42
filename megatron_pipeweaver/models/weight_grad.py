"""Weight gradients of megatron-core's linears, left to an op of their own where a plan splits them.

A linear's backward is two matrix products: the input gradient, which the stage in front waits for,
and the weight gradient, which nobody waits for. Where a stage pair is split, its linears compute
the first in ``B`` and leave the second, with the same operands in the same order, to ``W``:

    B: grad_input = grad_output @ weight        (input, grad_output) ──► LeftOut
    W: grad_weight = grad_output.T @ input      ──► the parameter's own accumulation, hooks included

Left to ``B`` is what costs little (norms, biases, embeddings) and what would hold memory that the
strategy has promised to free: linears whose operands were dropped or offloaded, and projectors,
whose output gradients are larger than what they save. So is a weight that the chunk uses twice
(tied embeddings on one rank), whose gradients autograd adds up before it accumulates them.

With sequence parallelism the linear keeps its share of the input alone, as Megatron's does, and
gathers it once more in ``W``; all tensor-parallel ranks run one plan, so they gather together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.delayed import DelayedCall, can_delay, delay

_FUSED_KERNELS: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "wgrad_gemm_accum_fp32",
        torch.float16: "wgrad_gemm_accum_fp16",
        torch.bfloat16: "wgrad_gemm_accum_fp16",
    }
)
"""Apex's kernel by the type of the buffer that it adds to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _WeightGrad:
    """One weight gradient to be computed: that of `weight`, from a linear's operands."""

    weight: torch.nn.Parameter
    input: Tensor
    grad_output: Tensor
    gather_from: Any
    """The tensor-parallel group whose ranks hold the rest of `input`, or `None`."""
    fused: bool
    """Whether Megatron's kernel adds straight into ``weight.main_grad``."""

    def compute(self) -> Tensor:
        """The gradient; in Megatron's order, so that it is equal to the last bit."""
        whole_input = self.input
        if self.gather_from is not None:
            whole_input = tensor_parallel.gather_from_sequence_parallel_region(
                whole_input, group=self.gather_from
            )
        grad_output, whole_input = prepare_input_tensors_for_wgrad_compute(
            self.grad_output, whole_input
        )
        if self.fused:
            return _add_fused(self.weight, whole_input, grad_output)
        gradient: Tensor = grad_output.t().matmul(whole_input)
        return gradient


class LeftOut:
    """The weight gradients that one stage pair's backward leaves out."""

    def __init__(self) -> None:
        self._left: deque[_WeightGrad] = deque()
        self._calls: list[DelayedCall] = []

    def add(self, one: _WeightGrad) -> None:
        """Leave `one` to `finish`; in the backward."""
        self._left.append(one)

    def add_call(self, one: DelayedCall) -> None:
        """Leave to `finish` what the backward of `one` will put off; in the forward."""
        self._calls.append(one)

    def tensors(self) -> Iterator[Tensor]:
        """What is held for them: inputs and output gradients."""
        for one in self._left:
            yield from (one.input, one.grad_output)
        for call in self._calls:
            yield from call.tensors()

    def finish(self) -> None:
        """Compute and accumulate them all, from the last linear to the first.

        Megatron's linears come before those of Transformer Engine, which lie below them.
        """
        while self._left:
            one = self._left.popleft()
            with torch.no_grad():
                gradient = one.compute()
            # Through the parameter's own accumulation, whose hooks tell Megatron's DDP.
            torch.autograd.backward(one.weight.expand_as(one.weight), gradient)
        while self._calls:
            self._calls.pop().finish()


class WeightGradients:
    """Where the linears of a chunk leave their weight gradients at the moment.

    Args:
        model: the chunk; its linears that own their weights can leave out their gradients.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._target: LeftOut | None = None
        modules: list[Any] = list(model.modules())
        projectors = [one for one in modules if isinstance(one, MultimodalProjector)]
        at_once = {id(part) for one in projectors for part in one.modules()}
        for module in modules:
            if id(module) in at_once:
                continue
            # The instances are the chunk's own; Megatron's classes stay as they are.
            linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
            if linear and module.weight is not None:
                module._forward_impl = _Linear(self, module._forward_impl)
            elif can_delay(module):
                delay(module, self)

    @contextmanager
    def leaving_out(self, split: bool) -> Iterator[LeftOut]:
        """Forwards inside have their backwards leave weight gradients out, if `split`.

        Yields:
            Where they will be.
        """
        left = LeftOut()
        with self._into(left if split else None):
            yield left

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Forwards inside have their backwards compute weight gradients themselves."""
        with self._into(None):
            yield

    @contextmanager
    def _into(self, target: LeftOut | None) -> Iterator[None]:
        before, self._target = self._target, target
        try:
            yield
        finally:
            self._target = before

    @property
    def target(self) -> LeftOut | None:
        """Where a linear that runs forward now leaves its weight gradient, if anywhere."""
        return self._target


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One forward of a linear, but for its tensors."""

    weight: torch.nn.Parameter
    left: LeftOut
    fused: bool
    sums_input_grad: bool
    sequence_parallel: bool
    group: Any


class _Linear:
    """Megatron's `_forward_impl` of one linear, with a backward that may leave out."""

    def __init__(self, gradients: WeightGradients, original: Callable[..., Tensor]) -> None:
        self._gradients = gradients
        self._original = original

    def __call__(self, input: Tensor, weight: torch.nn.Parameter, **options: Any) -> Tensor:
        left = self._gradients.target
        # Behind an input without gradient there is nothing to hand on, and nothing to put off.
        splits = weight.requires_grad and input.requires_grad and torch.is_grad_enabled()
        if left is None or not splits:
            return self._original(input=input, weight=weight, **options)
        call = _Call(
            weight=weight,
            left=left,
            fused=options["gradient_accumulation_fusion"] and hasattr(weight, "main_grad"),
            sums_input_grad=options["allreduce_dgrad"],
            sequence_parallel=options["sequence_parallel"],
            group=options["tp_group"],
        )
        # No edge to the weight: its hooks run when its gradient is there.
        apply: Callable[..., Tensor] = _LinearInputGrad.apply
        return apply(input, weight.detach(), options["bias"], call)


class _LinearInputGrad(torch.autograd.Function):
    """Megatron's `LinearWithGradAccumulationAndAsyncCommunication` up to the weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.has_bias, ctx.call = bias is not None, call
        if call.sequence_parallel:
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=call.group)
        output = torch.matmul(input, weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,), call = grads, ctx.call
        input, weight = ctx.saved_tensors
        grad_input = grad_output.matmul(weight)
        if call.sums_input_grad:
            torch.distributed.all_reduce(grad_input, group=call.group)
        elif call.sequence_parallel:
            grad_input = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                grad_input, group=call.group
            )
        call.left.add(
            _WeightGrad(
                weight=call.weight,
                input=input,
                grad_output=grad_output,
                gather_from=call.group if call.sequence_parallel else None,
                fused=call.fused,
            )
        )
        bias = grad_output.contiguous().flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return grad_input, None, bias, None


def _add_fused(weight: Any, whole_input: Tensor, grad_output: Tensor) -> Tensor:
    """Add the gradient into `main_grad` by Apex's kernel; returns what hooks take for it."""
    kind = weight.main_grad.dtype
    if kind not in _FUSED_KERNELS:
        raise ConfigError(
            f"gradient buffer of {kind}: Apex's kernels add to {[*_FUSED_KERNELS]} alone; "
            "give --no-gradient-accumulation-fusion"
        )
    add = getattr(layers.fused_weight_gradient_mlp_cuda, _FUSED_KERNELS[kind])
    add(whole_input, grad_output, weight.main_grad)
    weight.grad_added_to_main_grad = True
    # Megatron's hook wants a gradient to be there, and adds it only where zeros are asked for.
    zeros = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if zeros else torch.empty_like(weight)
