"""A stand-in for Apex's kernels that add a weight gradient into ``main_grad`` as it is computed.

``fused_weight_gradient_mlp_cuda`` has two, by the type that they add to; the name says fp16 and it
takes bfloat16 too. Megatron calls nothing else of it.
"""

from types import ModuleType

import torch
from torch import Tensor


def kernels() -> ModuleType:
    """The extension module, in plain torch."""
    made = ModuleType("fused_weight_gradient_mlp_cuda")
    made.wgrad_gemm_accum_fp32 = _adding({torch.float32})  # type: ignore[attr-defined]
    made.wgrad_gemm_accum_fp16 = _adding({torch.float16, torch.bfloat16})  # type: ignore[attr-defined]
    return made


def _adding(kinds):
    def add(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        assert main_grad.dtype in kinds, "the other kernel's"
        assert total_input.dim() == grad_output.dim() == 2
        main_grad.add_(grad_output.t().matmul(total_input).to(main_grad.dtype))

    return add
