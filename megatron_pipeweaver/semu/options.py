"""How the layers are run: implementation, element types, parallel sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import ParallelSizes


class Attention(StrEnum):
    """How attention runs, which decides what it computes and what it keeps."""

    DENSE = "dense"
    """Megatron's own: the whole score matrix is computed, masked and kept."""
    FLASH = "flash"
    """Fused: masked-out blocks are skipped, only the row statistics are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What shapes cost besides the model itself; one value for a whole job.

    `element_bytes` is that of weights and activations, `gradient_bytes` that of the gradient
    accumulation buffer, `mask_bytes` that of a dropout mask (the CPU keeps activations' type).
    `fused_norm`, `fused_activation` and `fused_rotary` say that an RMS norm and a gated activation
    keep their input alone, and rotary positions nothing (Transformer Engine, Apex, CUDA kernels);
    `fused_linear` that matmuls add biases, and weight gradients to their buffers, themselves.
    """

    parallel: ParallelSizes = field(default_factory=lambda: ParallelSizes(pipeline=1))
    attention: Attention = Attention.FLASH
    element_bytes: int = 2
    gradient_bytes: int = 4
    fused_norm: bool = True
    fused_activation: bool = True
    fused_rotary: bool = True
    fused_linear: bool = True
    dropout: bool = False
    mask_bytes: int = 1

    def __post_init__(self) -> None:
        for what in ("element_bytes", "gradient_bytes", "mask_bytes"):
            if getattr(self, what) < 1:
                raise ConfigError(f"run options: {what} is {getattr(self, what)}; it must be >= 1")

    @classmethod
    def unfused(cls, element_bytes: int = 4, dropout: bool = False) -> RunOptions:
        """Megatron's own layers on a CPU: nothing fused, dense attention."""
        return cls(
            attention=Attention.DENSE,
            element_bytes=element_bytes,
            gradient_bytes=element_bytes,
            fused_norm=False,
            fused_activation=False,
            fused_rotary=False,
            fused_linear=False,
            dropout=dropout,
            mask_bytes=element_bytes,
        )
