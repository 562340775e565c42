"""What a batch holds: counts and sizes, never tensors.

A *microbatch* is one sequence (or several of equal length) for the backbone plus the *items* of
the other modalities: images, clips, text prompts. Metadata is read from the next batch before it
is trained on, and is all the planner ever sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_pipeweaver.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One instance of a modality: an image, a clip, a prompt.

    `units` is its length inside its own module (patches of an image, latent patches of a clip,
    tokens of a prompt); `tokens` is how many tokens it becomes for the module that consumes it.
    """

    units: int
    tokens: int

    def __post_init__(self) -> None:
        if self.units < 1 or self.tokens < 0:
            raise ConfigError(f"item: units={self.units}, tokens={self.tokens}; need >= 1, >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchMetadata:
    """One microbatch.

    `items[module]` lists what the module works on, in the order of the microbatch's tensors; a
    module that is absent, or has no items, has no pass at all. The backbone works on whole
    sequences: `samples` of them, each padded to `sequence_length` tokens; `document_lengths` are
    the lengths of packed documents (one sample) and empty where nothing is packed.
    """

    sequence_length: int
    samples: int = 1
    items: Mapping[str, tuple[Item, ...]] = field(default_factory=dict)
    document_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sequence_length < 1 or self.samples < 1:
            raise ConfigError(
                f"microbatch: sequence_length={self.sequence_length}, samples={self.samples}; "
                "both must be >= 1"
            )
        if self.document_lengths and (self.samples > 1 or min(self.document_lengths) < 1):
            raise ConfigError(
                f"microbatch: documents of {self.document_lengths} tokens in {self.samples} "
                "samples; packed documents stand in one sample, each of at least 1 token"
            )
        if sum(self.document_lengths) > self.sequence_length:
            raise ConfigError(
                f"microbatch: documents of {sum(self.document_lengths)} tokens do not fit into "
                f"sequence_length={self.sequence_length}"
            )

    def count(self, module: str) -> int:
        """How many items `module` has in this microbatch."""
        return len(self.items.get(module, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetadata:
    """One pipeline replica's share of a global batch: its microbatches in training order."""

    microbatches: tuple[MicrobatchMetadata, ...]

    def __post_init__(self) -> None:
        if not self.microbatches:
            raise ConfigError("batch: no microbatch; a batch holds at least one")
