"""What a model is built with, beside its specification and its layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_pipeweaver.errors import ConfigError

POSITION_EMBEDDINGS = ("rope", "mrope", "learned_absolute", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """One of several vision encoders: its images, and where their embeddings go.

    `images` is the batch's key of its images, `image_size` their height and width in pixels;
    `token_id` stands in `tokens` wherever an embedding goes, and is no other encoder's.
    """

    images: str
    image_size: int
    token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How the chunks of a model are made.

    `image_size` is height and width in pixels; `image_token_id` stands in `tokens` wherever an
    image's embeddings go, once per embedding, and need not be in the vocabulary. With several
    vision encoders, `encoders[module]` says so of each. `initialize` is called with a rank's new
    chunks (`parameters.initialize_by_name` under a seed, say). `class_token` puts one in front of
    an image's patches, and takes it away again behind the ViT. Rotary embeddings turn
    `rotary_percent` of a head's channels, by positions divided by `rotary_interpolation`; their
    slow ones are slowed by `rope_scaling_factor`, as in Llama 3.1. `transformer_engine` is `None`
    for "where it can be imported and there is a GPU". `common` are fields of every module's
    `TransformerConfig`, `overrides[module]` those of one module; overrides win.
    """

    params_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    max_sequence_length: int = 4096
    image_size: int = 224
    image_token_id: int = -200
    encoders: Mapping[str, EncoderOptions] = field(default_factory=dict)
    class_token: bool = False
    position_embedding: str = "rope"
    rotary_base: int = 10_000
    rotary_percent: float = 1.0
    rotary_interpolation: float | None = None
    rope_scaling_factor: float | None = None
    transformer_engine: bool | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    initialize: Callable[[Sequence[Any]], None] | None = None

    def __post_init__(self) -> None:
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ConfigError(
                f"model options: position_embedding is {self.position_embedding!r}; "
                f"choose one of {POSITION_EMBEDDINGS}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model options: dropout is {self.dropout}; need 0 <= dropout < 1")
        if not 0.0 < self.rotary_percent <= 1.0:
            raise ConfigError(
                f"model options: rotary_percent is {self.rotary_percent}; need 0 < share <= 1"
            )
        for what in ("max_sequence_length", "image_size", "rotary_base"):
            if getattr(self, what) < 1:
                raise ConfigError(f"model options: {what} is {getattr(self, what)}; need >= 1")

    @property
    def rotary(self) -> dict[str, Any]:
        """What Megatron's rotary embeddings are made with, by its names."""
        return {
            "rotary_base": self.rotary_base,
            "rotary_percent": self.rotary_percent,
            "rope_scaling": self.rope_scaling_factor is not None,
            "rope_scaling_factor": self.rope_scaling_factor or 1.0,
            "seq_len_interpolation_factor": self.rotary_interpolation,
        }

    def encoder(self, name: str) -> EncoderOptions:
        """What is said of the vision encoder `name`; by default, it takes the ``images``."""
        usual = EncoderOptions(
            images="images", image_size=self.image_size, token_id=self.image_token_id
        )
        return self.encoders.get(name, usual)
