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
    accumulation buffer. `fused_norm` and `fused_activation` say that a norm, or a gated
    activation, keeps its input alone (Transformer Engine, Apex, fused kernels).
    """

    parallel: ParallelSizes = field(default_factory=lambda: ParallelSizes(pipeline=1))
    attention: Attention = Attention.FLASH
    element_bytes: int = 2
    gradient_bytes: int = 4
    fused_norm: bool = True
    fused_activation: bool = True
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.element_bytes < 1 or self.gradient_bytes < 1:
            raise ConfigError(
                f"run options: element_bytes={self.element_bytes}, "
                f"gradient_bytes={self.gradient_bytes}; both must be >= 1"
            )
