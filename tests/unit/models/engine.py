"""Transformer Engine on a CPU: the real one over played kernels, or else a stand-in for it.

The stand-in has its linears as Megatron's classes build on them. It mirrors what 2.20 promises of
weight gradients that are put off, in plain torch and fp64: which attributes a module has, what its
backward returns then, what ``backward_dw`` writes where, and what the first microbatch of an
iteration does to ``main_grad``. Tensor parallelism, fp8 and kernels are not in it.

Imported as a pytest plugin (``-p tests.unit.models.engine``), this module sees to it that whatever
is imported afterwards finds one of the two, and Apex's kernels.
"""

from __future__ import annotations

import queue
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.unit.models.apex import kernels

VERSION = "2.20.2"
_PACKAGE = "transformer_engine"
_PARTS = [f"{_PACKAGE}.{one}" for one in ("pytorch", "common")]
_UNUSED = [f"{_PACKAGE}.common.recipe"] + [
    f"{_PACKAGE}.pytorch.{one}" for one in ("ops", "fp8", "router", "distributed", "tensor")
]
"""What Megatron imports names from, and calls nothing of here."""


class WeightGradStore:
    """What waits for its `backward_dw`: operands and products, first in, first out."""

    def __init__(self, delay_wgrad_compute: bool = False, ub_bulk_wgrad: bool = False) -> None:
        assert not ub_bulk_wgrad
        self.context: Any = queue.Queue() if delay_wgrad_compute else None
        self.enabled = delay_wgrad_compute

    def delay_wgrad_compute(self) -> bool:
        return self.enabled

    def put(self, tensors: list[Any], product: Any) -> None:
        assert self.enabled
        self.context.put([tensors, product])

    def pop(self) -> tuple[Any, list[Any]]:
        assert self.enabled
        if self.context.empty():
            raise RuntimeError("Pop empty queue")
        tensors, product = self.context.get()
        return product(*tensors), tensors


class TransformerEngineBaseModule(nn.Module):
    weight_names: list[str]
    bias_names: list[str]

    def set_up(self, options: dict[str, Any]) -> None:
        self.fuse_wgrad_accumulation = options.get("fuse_wgrad_accumulation", False)
        self.sequence_parallel = options.get("sequence_parallel", False)
        self.tp_size = options.get("tp_size", 1)
        self.tp_rank = 0
        self.parallel_mode = options.get("parallel_mode")
        self.return_bias = options.get("return_bias", False)
        self.wgrad_accumulation_and_reduce_hooks: list[Any] = []
        self.wgrad_store = WeightGradStore(options.get("delay_wgrad_compute", False))

    def make(self, name: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        weight = torch.zeros(shape, dtype=options["params_dtype"])
        if len(shape) > 1 and options.get("init_method") is not None:
            options["init_method"](weight)
        self.register_parameter(name, nn.Parameter(weight))
        if self.wgrad_store.delay_wgrad_compute():
            getattr(self, name).skip_backward_post_hook = True

    def need_backward_dw(self) -> bool:
        return self.wgrad_store.delay_wgrad_compute()

    def backward_dw(self) -> None:
        if not self.need_backward_dw():
            return
        (wgrad, bgrad), _ = self.wgrad_store.pop()
        weight = getattr(self, self.weight_names[0])
        if not self.fuse_wgrad_accumulation:
            weight.grad = wgrad  # whatever was there
        if bgrad is not None:
            bias = getattr(self, self.bias_names[0])
            if bias.grad is None:
                bias.grad = bgrad
        self.call_hooks()

    def call_hooks(self) -> None:
        for hook in self.wgrad_accumulation_and_reduce_hooks:
            hook()


class Linear(TransformerEngineBaseModule):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any):
        super().__init__()
        self.set_up(options)
        self.use_bias = bias
        self.apply_bias = bias and not self.return_bias
        self.weight_names, self.bias_names = ["weight"], ["bias"] if bias else []
        self.make("weight", (out_features, in_features), options)
        self.in_features, self.out_features = in_features, out_features
        if bias:
            self.make("bias", (out_features,), options)
        else:
            self.bias = None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        bias = self.bias if self.apply_bias else None
        output = _Product.apply(inp, self.weight, bias, self, is_first_microbatch)
        return (output, self.bias) if self.return_bias else output


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5, **options: Any):
        super().__init__(in_features, out_features, **options)
        self.eps = eps
        self.rms = options.get("normalization", "LayerNorm") == "RMSNorm"
        ones = torch.ones(in_features, dtype=options["params_dtype"])
        self.layer_norm_weight = nn.Parameter(ones)
        self.layer_norm_bias = None if self.rms else nn.Parameter(torch.zeros_like(ones))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        shape = inp.shape[-1:]
        if self.rms:
            normed = nn.functional.rms_norm(inp, shape, self.layer_norm_weight, self.eps)
        else:
            normed = nn.functional.layer_norm(
                inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps
            )
        return super().forward(normed, is_first_microbatch)


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, **options: Any
    ):
        super().__init__()
        self.set_up(options)
        self.num_gemms, self.use_bias = num_gemms, bias
        self.in_features, self.out_features = in_features, out_features
        self.apply_bias = bias and not self.return_bias
        self.weight_names = [f"weight{one}" for one in range(num_gemms)]
        self.bias_names = [f"bias{one}" for one in range(num_gemms)] if bias else []
        for name in self.weight_names:
            self.make(name, (out_features, in_features), options)
        for name in self.bias_names:
            self.make(name, (out_features,), options)

    def forward(
        self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        assert not self.use_bias
        weights = [getattr(self, name) for name in self.weight_names]
        output: Tensor = _GroupedProduct.apply(
            inp, list(m_splits), self, is_first_microbatch, *weights
        )
        return output

    def backward_dw(self) -> None:
        if not self.need_backward_dw() or self.wgrad_store.context.empty():
            return
        _, tensors = self.wgrad_store.pop()
        if not self.fuse_wgrad_accumulation:
            for name, wgrad in zip(self.weight_names, tensors[2], strict=True):
                getattr(self, name).grad = wgrad
        self.call_hooks()


def _add(weight: Any, gradient: Tensor, first: bool | None) -> None:
    """Into `main_grad`; the first microbatch's takes the place of what is there."""
    if first:
        weight.main_grad.copy_(gradient)
    else:
        weight.main_grad.add_(gradient)


def _returned(weight: Any, gradient: Tensor | None, module: Any) -> Tensor | None:
    """What a backward hands to autograd for a weight: with `main_grad`, anything of its shape."""
    if not module.fuse_wgrad_accumulation:
        return gradient
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    zeros = getattr(weight, "zero_out_wgrad", False)
    return torch.full_like(weight, 0.0 if zeros else float("nan"))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, weight: Tensor, bias: Any, module: Any, first: Any) -> Any:
        ctx.save_for_backward(inp, weight)
        ctx.weight, ctx.bias, ctx.module, ctx.first = weight, bias is not None, module, first
        ctx.store = module.wgrad_store  # of the forward, asked in the backward
        output = torch.matmul(inp, weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (inp, weight), module = grads, ctx.saved_tensors, ctx.module
        dgrad = dy.matmul(weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            bgrad = dy.flatten(0, -2).sum(0) if ctx.bias else None
            return dgrad, None, bgrad, None, None

        def product(inp: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
            dy, inp = dy.flatten(0, -2), inp.flatten(0, -2)
            gradient, bgrad = dy.t().matmul(inp), dy.sum(0) if ctx.bias else None
            if module.fuse_wgrad_accumulation:
                _add(ctx.weight, gradient, ctx.first)
                return None, bgrad
            return gradient, bgrad

        wgrad = bgrad = None
        if ctx.store.delay_wgrad_compute():
            ctx.store.put([inp, dy], product)
        else:
            wgrad, bgrad = product(inp, dy)
        return dgrad, _returned(ctx.weight, wgrad, module), bgrad, None, None


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, splits: Any, module: Any, first: Any, *weights: Any) -> Any:
        ctx.save_for_backward(inp, *weights)
        ctx.weights, ctx.splits, ctx.module, ctx.first = weights, splits, module, first
        ctx.store = module.wgrad_store
        parts = inp.split(splits)
        return torch.cat([one @ weight.t() for one, weight in zip(parts, weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (inp, *weights), module = grads, ctx.saved_tensors, ctx.module
        fused = module.fuse_wgrad_accumulation
        inputs, outputs = inp.split(ctx.splits), dy.split(ctx.splits)
        dgrad = torch.cat([one @ weight for one, weight in zip(outputs, weights, strict=True)])
        into = [None if fused else torch.empty_like(one) for one in weights]

        def product(inputs: Any, outputs: Any, into: Any) -> tuple[Any, list[None], None]:
            for one, dy, weight, to in zip(inputs, outputs, ctx.weights, into, strict=True):
                gradient = dy.t() @ one
                if fused:
                    _add(weight, gradient, ctx.first)
                else:
                    to.copy_(gradient)
            return into, [None] * len(into), None

        if ctx.store.delay_wgrad_compute():
            ctx.store.put([inputs, outputs, into], product)
        else:
            product(inputs, outputs, into)
        found = [_returned(one, to, module) for one, to in zip(ctx.weights, into, strict=True)]
        return dgrad, None, None, None, *found


class DotProductAttention(nn.Module):
    """Dense attention under the mask that Megatron's class names; [S, B, heads, size]."""

    def __init__(self, num_attention_heads: int, kv_channels: Any, **options: Any) -> None:
        super().__init__()
        self.causal = "causal" in options["attn_mask_type"]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        heads = query.shape[2] // key.shape[2]
        query, key, value = (
            one.permute(1, 2, 0, 3)
            for one in (
                query,
                key.repeat_interleave(heads, dim=2),
                value.repeat_interleave(heads, dim=2),
            )
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class _Norm:
    """`LayerNorm` and `RMSNorm` take what torch's do not, and their size by an older name too."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        *,
        hidden_size: int | None = None,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        size = hidden_size if normalized_shape is None else normalized_shape
        super().__init__(size, eps, dtype=params_dtype)  # type: ignore[call-arg]


class LayerNorm(_Norm, nn.LayerNorm):
    pass


class RMSNorm(_Norm, nn.RMSNorm):
    pass


class _Anything:
    """What Megatron names where it defines its classes, and does not call here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _AnyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


def install() -> None:
    """Be ``transformer_engine`` for what is imported from now on."""
    package = ModuleType(_PACKAGE)
    parts = {_PACKAGE: package} | {name: ModuleType(name) for name in _PARTS}
    parts |= {name: _AnyModule(name) for name in _UNUSED}
    for kind in (Linear, LayerNormLinear, GroupedLinear, DotProductAttention, LayerNorm, RMSNorm):
        kind.__module__ = f"{_PACKAGE}.pytorch"
        setattr(parts[f"{_PACKAGE}.pytorch"], kind.__name__, kind)
    TransformerEngineBaseModule.__module__ = f"{_PACKAGE}.pytorch"
    package.__version__ = VERSION  # type: ignore[attr-defined]
    for name, part in parts.items():
        parent, _, own = name.rpartition(".")
        part.__path__ = []  # a package
        part.__spec__ = ModuleSpec(name, None, is_package=True)
        if parent:
            setattr(parts[parent], own, part)
    sys.modules.update(parts)


def _be_there() -> None:
    sys.modules["fused_weight_gradient_mlp_cuda"] = kernels()
    if find_spec(_PACKAGE) is None:
        install()
    else:
        from tests.unit.models.engine_kernels import play

        play(DotProductAttention, LayerNorm, RMSNorm)


if "megatron.core" not in sys.modules:
    _be_there()
