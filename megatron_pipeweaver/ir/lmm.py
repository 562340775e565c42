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


MOST_LAYERS = 10_000
"""More are a mistake, and would take long to find out about."""
MODULATIONS = 6
"""Vectors that modulate a diffusion layer: shift, scale and gate of attention and of the MLP."""


class Modulation(StrEnum):
    """Where a diffusion layer's shifts, scales and gates come from."""

    LINEAR = "linear"
    """A linear of its own from the time embedding (DiT)."""
    TABLE = "table"
    """A learned table per layer, added to one projection that all layers share (Wan2.1)."""

    @property
    def time_tokens(self) -> int:
        """Vectors per clip that layers read: the time embedding, and the shared projection."""
        return 1 + (MODULATIONS if self is Modulation.TABLE else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """A mixture of experts in place of the MLP.

    Every token goes to `active` of `count` experts of width `ffn_hidden_size`, and through a
    shared expert of width `shared_ffn_hidden_size` where that is not `None`; the first
    `dense_layers` layers keep an MLP, or all but `only_layers` where these are named.
    """

    count: int
    active: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int | None = None
    dense_layers: int = 0
    only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count or self.ffn_hidden_size < 1 or self.dense_layers < 0:
            raise ConfigError(
                f"experts: {self.active} active of {self.count}, width {self.ffn_hidden_size}, "
                f"{self.dense_layers} dense layers; need 1 <= active <= count, width >= 1"
            )

        if self.only_layers and self.dense_layers:
            raise ConfigError(
                f"experts: only_layers {list(self.only_layers)} and {self.dense_layers} dense "
                "layers; name one of them"
            )

    def holds(self, layer: int) -> bool:
        """Whether the layer of this index in its module has experts."""
        return layer in self.only_layers if self.only_layers else layer >= self.dense_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentOptions:
    """Multi-head latent attention (DeepSeek-V2): what it reads is brought down to narrow latents.

    Keys and values of all heads come from one latent of width `kv_rank`, queries from one of width
    `query_rank`, or from the hidden states where that is `None`. `head_size` channels of a head's
    query and key know no position, `rotary_size` more are turned; those of the key are the same in
    every head. A head's value has `value_size`. With `LayerOptions.qk_norm`, latents are normed.

    In Megatron's words: kv_lora_rank, q_lora_rank, qk_head_dim, qk_pos_emb_head_dim, v_head_dim.
    """

    kv_rank: int
    query_rank: int | None = None
    head_size: int
    rotary_size: int
    value_size: int

    def __post_init__(self) -> None:
        for what in ("kv_rank", "query_rank", "head_size", "rotary_size", "value_size"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ConfigError(f"latent attention: {what} is {value}; it must be >= 1")
        if self.rotary_size % 2:
            raise ConfigError(
                f"latent attention: rotary_size is {self.rotary_size}; rotary positions turn "
                "pairs, make it even"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What a module's layers have besides width and depth; `None` is its kind's usual choice.

    `latent` says that attention is latent, and how wide; `head_size` is then left out. `window` is
    the longest stretch, in units, that attention sees, except in `full_attention_layers`; causal
    attention sees so many units up to its own.
    `context_size` is the width that cross-attention reads, in every layer or in
    `cross_attention_layers` alone, where it takes the place of self-attention if
    `cross_attention_alone` (Llama 3.2 Vision). `tap_layers` are those whose output a projector of
    its own also hands on (DeepStack). `positions` are learned position embeddings.
    """

    head_size: int | None = None
    rms_norm: bool | None = None
    bias: bool | None = None
    qkv_bias: bool | None = None
    rotary: bool | None = None
    qk_norm: bool = False
    window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    latent: LatentOptions | None = None
    experts: ExpertOptions | None = None
    context_size: int | None = None
    cross_attention_layers: tuple[int, ...] = ()
    cross_attention_alone: bool = False
    modulation: Modulation | None = None
    tap_layers: tuple[int, ...] = ()
    positions: int = 0

    def __post_init__(self) -> None:
        for what in ("head_size", "window", "context_size"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ConfigError(f"layer options: {what} is {value}; it must be >= 1")
        if self.positions < 0:
            raise ConfigError(f"layer options: positions is {self.positions}; it must be >= 0")
        if self.latent is not None and self.head_size is not None:
            raise ConfigError(
                f"layer options: head_size {self.head_size} with latent attention, which has "
                "sizes of its own; leave it out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSpec:
    """One modality module.

    `after` names the modules whose outputs it consumes. A `frozen` module has no backward pass.
    `output_size` is the width of what it hands on (after its projector), `None` where nothing
    consumes it; in front of the projector, `patches_per_token` neighbouring units are folded into
    one token of that many times the width. `input_size` is the width of what it consumes where
    that is not its own: its first stage projects it, in two linears. `vocab_size` is `None` for
    modules without token embeddings.
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
    input_size: int | None = None
    output_size: int | None = None
    projector_hidden_size: int | None = None
    patch_size: int | None = None
    image_channels: int = 3
    patches_per_token: int = 1
    layer: LayerOptions = LayerOptions()

    def __post_init__(self) -> None:
        where = f"module {self.name!r}"
        if not self.name.isidentifier() or self.name[-1].isdigit():
            raise ConfigError(f"{where}: a name is an identifier that does not end in a digit")
        for what in (
            "layers",
            "hidden_size",
            "ffn_hidden_size",
            "attention_heads",
            "kv_groups",
            "patches_per_token",
        ):
            if getattr(self, what) < 1:
                raise ConfigError(f"{where}: {what} is {getattr(self, what)}; it must be >= 1")
        if self.layers > MOST_LAYERS:
            raise ConfigError(f"{where}: layers is {self.layers}; it must be at most {MOST_LAYERS}")
        for what in ("full_attention_layers", "cross_attention_layers", "tap_layers"):
            beyond = [one for one in getattr(self.layer, what) if not 0 <= one < self.layers]
            if beyond:
                raise ConfigError(
                    f"{where}: {what} names layer {beyond[0]}; there are {self.layers}, from 0 on"
                )
        experts = self.layer.experts
        if experts is not None and any(not 0 <= one < self.layers for one in experts.only_layers):
            raise ConfigError(
                f"{where}: experts stand in layers {list(experts.only_layers)}; there are "
                f"{self.layers}, from 0 on"
            )
        own_size = self.layer.head_size or self.layer.latent
        if own_size is None and self.hidden_size % self.attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} is not a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        if self.layer.latent is not None and self.kv_groups != self.attention_heads:
            raise ConfigError(
                f"{where}: kv_groups is {self.kv_groups}; latent attention has keys and values for "
                f"every head, make it attention_heads, {self.attention_heads}"
            )
        if self.attention_heads % self.kv_groups:
            raise ConfigError(
                f"{where}: attention_heads {self.attention_heads} is not a multiple of "
                f"kv_groups {self.kv_groups}"
            )

    @property
    def time_tokens(self) -> int:
        """Vectors per clip that tell a diffusion module's layers the time; else 0.

        They and the prompts' features travel in front of the clips' patches, in one row.
        """
        if self.kind is not ModuleKind.DIFFUSION or self.layer.modulation is None:
            return 0
        return self.layer.modulation.time_tokens


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
