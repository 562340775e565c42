"""What the rest of PipeWeaver asks of a cost model, and what it tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The work that one pass brings to every layer of a module.

    `lengths` are the sequences that attention stays within: images, clips, packed documents or
    whole samples. `sequence` and `batch` are the leading sizes of the hidden tensor, as laid out;
    where they hold more tokens than `lengths`, the rest is padding. `output_tokens` leave the
    module after its projector; `context_lengths` are what cross-attention reads, one entry per
    entry of `lengths` or a single one for all.
    """

    sequence: int
    batch: int
    lengths: tuple[int, ...]
    output_tokens: int = 0
    context_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sequence < 1 or self.batch < 1 or not self.lengths or min(self.lengths) < 1:
            raise ConfigError(
                f"load: sequence={self.sequence}, batch={self.batch}, lengths={self.lengths}; "
                "every size must be >= 1"
            )
        if sum(self.lengths) > self.tokens:
            raise ConfigError(
                f"load: {sum(self.lengths)} tokens do not fit into {self.sequence} x {self.batch}"
            )

    @property
    def tokens(self) -> int:
        """Tokens (patches) that every layer works on, padding included."""
        return self.sequence * self.batch

    @property
    def packed(self) -> bool:
        """Whether sequences of their own length share one row of the hidden tensor."""
        return any(length != self.sequence for length in self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShape:
    """Which part of a module a stage holds.

    `is_first` stages embed (tokens or patches), `is_last` stages project, or make the loss.
    """

    layers: int
    is_first: bool
    is_last: bool
    first_layer: int = 0


class CostModel(Protocol):
    """Times and memory of stage pairs, and of messages between ranks."""

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        """The candidate strategies of one stage pair, on one rank.

        A frozen module's `weight_grad_ns` is 0. Times in nanoseconds, memory in bytes.
        """
        ...

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """Time that a message of `size_bytes` takes between two neighbouring pipeline ranks."""
        ...
