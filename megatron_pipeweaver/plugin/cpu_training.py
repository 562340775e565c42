"""What `megatron.training` needs on a machine without a GPU, beside what all of Megatron needs."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_pipeweaver.plugin.patching import Patch

_CPU_PROPERTIES = types.SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0)


def cpu_training_patches(training: Any) -> list[Patch]:
    """The patches, not applied yet; none where CUDA is available.

    Args:
        training: the module `megatron.training.training`.
    """
    if torch.cuda.is_available():
        return []
    from megatron.training import initialize

    initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # core_v0.16 compiles CUDA kernels.
    kernels = getattr(initialize, "fused_kernels", None)
    return [
        *([] if kernels is None else [Patch(kernels, "load", _nothing)]),
        Patch(training, "initialize_megatron", initialize_megatron),
        # It warms fused kernels up in bf16.
        Patch(training, "set_jit_fusion_options", _nothing),
        # Megatron sets its parallel state and its seeds up where it counts a device.
        Patch(torch.cuda, "device_count", lambda: 1),
        # With sequence parallelism, it asks for the device's generation.
        Patch(torch.cuda, "get_device_properties", lambda device=None: _CPU_PROPERTIES),
        Patch(CLIPViTModel, "__init__", plain_norm_hook(CLIPViTModel.__init__)),
        Patch(WrappedTorchNorm, "__new__", sharded_norm_hook(WrappedTorchNorm.__new__)),
    ]


def sharded_norm_hook(original: Callable[..., torch.nn.Module]) -> Any:
    """`WrappedTorchNorm.__new__` that takes sequence parallelism as the fused norms do.

    Each rank norms its share of the sequence, so its parameters' gradients are shares as well;
    those that are marked are summed by Megatron when it finalises gradients.
    """

    @functools.wraps(original)
    def make(kind: type, config: Any, *more: Any, **named: Any) -> torch.nn.Module:
        if not config.sequence_parallel:
            return original(kind, config, *more, **named)
        alone = copy.copy(config)
        alone.sequence_parallel = False
        norm = original(kind, alone, *more, **named)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return norm

    return staticmethod(make)


def plain_norm_hook(original: Callable[..., None]) -> Callable[..., None]:
    """`CLIPViTModel.__init__` whose default norms take what Megatron calls them with.

    Without Transformer Engine the defaults are `torch.nn.LayerNorm`, which does not.
    """
    signature = inspect.signature(original)
    norms = {
        name: WrappedTorchNorm
        for name, one in signature.parameters.items()
        if one.default is torch.nn.LayerNorm
    }

    @functools.wraps(original)
    def initialize(*positional: Any, **named: Any) -> None:
        given = signature.bind(*positional, **named).arguments
        original(*positional, **named, **{k: v for k, v in norms.items() if k not in given})

    return initialize


def _nothing(*_: Any, **__: Any) -> None:
    return None
