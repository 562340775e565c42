"""The real Transformer Engine on a CPU: its modules and backwards over products in plain torch.

Transformer Engine can be imported where there is no GPU, but refuses to build modules there and
has kernels for nothing else. What is played here is below all that decides about weight
gradients: matrix products, norms, attention and the questions after a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from torch import Tensor, nn
from transformer_engine.pytorch import cpp_extensions
from transformer_engine.pytorch.module import layernorm_linear, linear

_norm = torch.ops.aten.native_layer_norm
_norm_backward = torch.ops.aten.native_layer_norm_backward


def play(*modules: type[nn.Module]) -> None:
    """Put torch in the place of kernels, for the rest of this process.

    Args:
        modules: what stands for Transformer Engine's modules of these names, which have kernels of
            their own and no weight gradients to put off.
    """
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    for module in (linear, layernorm_linear):
        module.general_gemm = _gemm
        module.get_dummy_wgrad = _dummy
    for kernels in (tex, cpp_extensions):
        kernels.layernorm_fwd, kernels.layernorm_bwd = _normed, _normed_backward
        kernels.rmsnorm_fwd, kernels.rmsnorm_bwd = _rms_normed, _rms_normed_backward
    for kind in modules:
        setattr(te, kind.__name__, kind)
    _build_without_gpu()


def _build_without_gpu() -> None:
    """Modules ask for a GPU when they are made, and Megatron must not find one."""
    build = te.module.base.TransformerEngineBaseModule.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        asked, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        try:
            build(self, *args, **options)
        finally:
            torch.cuda.is_available = asked

    te.module.base.TransformerEngineBaseModule.__init__ = made


def _dummy(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    return torch.full(shape, 0.0 if zero else float("nan"), dtype=dtype)


def _gemm(
    A: Tensor,
    B: Tensor,
    *,
    layout: str = "TN",
    out: Tensor | None = None,
    accumulate: bool = False,
    bias: Tensor | None = None,
    grad: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Column-major, as cuBLAS has it: ``B @ A`` of row-major matrices."""
    transposed = layout[1] == "T"
    if transposed:  # over all tokens
        A, B = A.flatten(0, -2), B.flatten(0, -2)
    bgrad = B.sum(0) if transposed and grad and bias is not None else None
    made = (B.t() if transposed else B).matmul(A.t() if layout[0] == "T" else A)
    if bias is not None and not grad:
        made = made + bias
    if out is not None:
        made = out.add_(made) if accumulate else out.copy_(made)
    return made, bgrad, None, None


def _normed(
    inp: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = _norm(inp, inp.shape[-1:], weight, bias, eps)
    return made


def _normed_backward(
    dy: Tensor, inp: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, *_: Any
) -> Sequence[Tensor]:
    made: Sequence[Tensor] = _norm_backward(
        dy, inp, inp.shape[-1:], mean, rsigma, weight, torch.zeros_like(weight), [True] * 3
    )
    return made


def _rms_normed(inp: Tensor, weight: Tensor, eps: float, *_: Any) -> tuple[Tensor, None, Tensor]:
    rsigma = (inp.square().mean(-1, keepdim=True) + eps).rsqrt()
    return inp * rsigma * weight, None, rsigma


def _rms_normed_backward(
    dy: Tensor, inp: Tensor, rsigma: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    normed, scaled = inp * rsigma, dy * weight
    dgrad = rsigma * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dgrad, (dy * normed).flatten(0, -2).sum(0)
