"""Large multimodal models: modality modules and how they feed each other.

Only what costs and shapes depend on stands here; weights and torch modules live in `models`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_pipeweaver.errors import ConfigError


class ModuleKind(StrEnum):
    """What a modality module is made of."""

    VISION = "vision"
    """A ViT over images or frames, with a projector into its consumer's width."""
    LANGUAGE = "language"
    """A decoder-only language model over whole sequences."""
    TEXT = "text"
    """A language model used as a text encoder (no vocabulary head), over items."""
    DIFFUSION = "diffusion"
    """A diffusion transformer over clips, conditioned on text by cross attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSpec:
    """One modality module.

    `after` names the modules whose outputs it consumes. A `frozen` module has no backward pass.
    `output_size` is the width of what it hands on (after its projector), `None` where nothing
    consumes it. `vocab_size` is `None` for modules without token embeddings.
    """

    name: str
    kind: ModuleKind
    layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int
    kv_groups: int
    after: tuple[str, ...] = ()
    frozen: bool = False
    gated_mlp: bool = False
    vocab_size: int | None = None
    tied_embeddings: bool = False
    output_size: int | None = None
    projector_hidden_size: int | None = None
    patch_size: int | None = None
    image_channels: int = 3

    def __post_init__(self) -> None:
        where = f"module {self.name!r}"
        if not self.name.isidentifier() or self.name[-1].isdigit():
            raise ConfigError(f"{where}: a name is an identifier that does not end in a digit")
        for what in ("layers", "hidden_size", "ffn_hidden_size", "attention_heads", "kv_groups"):
            if getattr(self, what) < 1:
                raise ConfigError(f"{where}: {what} is {getattr(self, what)}; it must be >= 1")
        if self.hidden_size % self.attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} is not a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        if self.attention_heads % self.kv_groups:
            raise ConfigError(
                f"{where}: attention_heads {self.attention_heads} is not a multiple of "
                f"kv_groups {self.kv_groups}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model: its modules in forward order; the last one, the backbone, makes the loss."""

    name: str
    modules: tuple[ModuleSpec, ...]

    def __post_init__(self) -> None:
        if not self.modules:
            raise ConfigError(f"model {self.name!r}: no module")
        seen: set[str] = set()
        for module in self.modules:
            missing = set(module.after) - seen
            if missing or module.name in seen:
                raise ConfigError(
                    f"model {self.name!r}, module {module.name!r}: names must be unique and a "
                    f"module stands behind those it consumes (missing before it: {sorted(missing)})"
                )
            seen.add(module.name)
        for module in self.modules[:-1]:
            if not self.consumers(module.name):
                raise ConfigError(
                    f"model {self.name!r}: nothing consumes module {module.name!r}; "
                    "name it in another module's `after`"
                )

    @property
    def backbone(self) -> ModuleSpec:
        """The module that makes the loss."""
        return self.modules[-1]

    def module(self, name: str) -> ModuleSpec:
        """The module called `name`; `ConfigError` if there is none."""
        for module in self.modules:
            if module.name == name:
                return module
        names = [module.name for module in self.modules]
        raise ConfigError(f"model {self.name!r} has no module {name!r}; it has {names}")

    def consumers(self, name: str) -> tuple[ModuleSpec, ...]:
        """The modules that consume the output of `name`."""
        return tuple(module for module in self.modules if name in module.after)
