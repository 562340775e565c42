"""Chunks of a diffusion transformer that learns to denoise clips, conditioned on prompts.

What travels from stage to stage is one tensor of rows, so that plans know one shape per pass, and
gradients flow back to the time embedding and the text encoder by themselves:

    rows [N * k + T + S, 1, H]  =  k time vectors per clip | prompts' features | clips' patches

Layers work on the patches; time and prompts go past them unchanged. A batch holds tuples with one
entry per clip: ``clips`` and ``noise`` [C, T, Y, X], ``prompts`` [tokens], and ``timesteps`` [N] in
0 to 1. The model sees ``(1 - t) * clip + t * noise`` and learns ``noise - clip`` (flow matching,
arXiv 2210.02747).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import functional

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import MODULATIONS, Modulation, ModuleSpec
from megatron_pipeweaver.models.chunk import ChunkSetting, NamedChunk
from megatron_pipeweaver.models.diffusion_layer import PlainNorm, diffusion_layer_spec, modulated
from megatron_pipeweaver.models.packing import block_mask, items_in_a_row, packed_sequences
from megatron_pipeweaver.models.specs import uses_transformer_engine

_FREQUENCIES = 128
"""Sines, and as many cosines, that a time is told by."""
_TIME_SCALE = 1000.0
"""Times of 0 to 1 are told apart as DiT's steps of 0 to 1000 are."""
_LONGEST_PERIOD = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBatch:
    """A microbatch's clips as one row of patches.

    `sizes` are frames, rows and columns of each clip in patches, `prompts` the tokens of each
    clip's prompt, empty where the batch has none.
    """

    sizes: tuple[tuple[int, int, int], ...]
    prompts: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each clip."""
        return tuple(math.prod(size) for size in self.sizes)


@final
class DiffusionChunk(NamedChunk):
    """Some layers of a diffusion transformer: with the embeddings in front, or the head behind.

    Parameters are named ``<module>_model.``. Runs without sequence parallelism.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(setting)
        module, place = setting.module, setting.place
        _check(setting)
        modulation = module.layer.modulation
        assert modulation is not None
        self._module = module
        self._time_tokens = modulation.time_tokens
        self._fused = uses_transformer_engine(setting.options)
        model = MegatronModule(config=setting.config)
        if place.is_first:
            model.embedding = DiffusionEmbedding(module, setting.config)
        model.decoder = TransformerBlock(
            setting.config,
            diffusion_layer_spec(module, setting.options),
            pre_process=False,
            post_process=False,
            pg_collection=setting.groups,
            vp_stage=place.segment,
        )
        if place.is_last:
            model.head = DiffusionHead(module, setting.config)
        self.hold(model)

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Clips and prompts' features, or rows, to rows [N * k + T + S, 1, H].

        The last chunk returns the loss of every patch [1, S], the mean square over its values; or
        the predicted velocity [1, S, values] where the batch has no ``noise`` and its clips are
        those to be denoised.
        """
        del items  # the backbone works on every clip
        clips = self._clips(batch)
        model = self.model
        if self.place.is_first:
            rows_SBH = model.embedding(batch, clips, inputs)
        else:
            rows_SBH = self.only_input(inputs)
        at = len(clips.lengths) * self._time_tokens + sum(clips.prompts)
        conditions_SBH, patches_SBH = rows_SBH[:at], rows_SBH[at:]
        patches_SBH = self._through_layers(patches_SBH, conditions_SBH, clips)
        if not self.place.is_last:
            return torch.cat([conditions_SBH, patches_SBH])
        time_NH = conditions_SBH[: at - sum(clips.prompts) : self._time_tokens, 0]
        velocity_SP: Tensor = model.head(patches_SBH, time_NH, clips.lengths)[:, 0]
        if batch.get("noise") is None:
            return velocity_SP.unsqueeze(0)
        return velocity_loss(velocity_SP, batch, self._module).unsqueeze(0)

    def _through_layers(self, patches: Tensor, conditions: Tensor, clips: ClipBatch) -> Tensor:
        decoder, device = self.model.decoder, patches.device
        lengths, prompts = clips.lengths, clips.prompts
        masks: list[Tensor | None] = [None, None]
        if not self._fused:
            masks = [block_mask(lengths, other, device) for other in (lengths, prompts)]
        decoder.set_input_tensor(patches)
        output: Tensor = decoder(
            hidden_states=None,
            attention_mask=masks[0],
            context=conditions,
            context_mask=masks[1],
            packed_seq_params=packed_sequences(lengths, device, prompts or lengths),
        )
        decoder.input_tensor = None
        return output

    def _clips(self, batch: Mapping[str, Any]) -> ClipBatch:
        """The sizes of the microbatch's clips, checked."""
        where = f"chunk {self.place.module}{self.place.stage}"
        module, clips = self._module, batch.get("clips", ())
        patch = module.patch_size or 1
        for clip in clips:
            channels, _, height, width = clip.shape
            if channels != module.image_channels or height % patch or width % patch:
                raise ConfigError(
                    f"{where}: a clip is {tuple(clip.shape)}; it must have "
                    f"{module.image_channels} channels, and height and width be multiples of "
                    f"{patch}"
                )
        prompts = tuple(len(one) for one in batch.get("prompts", ()))
        if not clips or len(prompts) not in (0, len(clips)):
            raise ConfigError(
                f"{where}: the microbatch has {len(clips)} clips and {len(prompts)} prompts; "
                "give at least one clip, and a prompt for each or none at all"
            )
        sizes = tuple(
            (clip.shape[1], clip.shape[2] // patch, clip.shape[3] // patch) for clip in clips
        )
        return ClipBatch(sizes=sizes, prompts=prompts)


class DiffusionEmbedding(torch.nn.Module):
    """Clips, times and prompts' features as the rows that the layers work on.

    The time embedding is that of DiT; with a table in every layer, the projection that they share
    stands here. Features of another width are projected by two linears, as in PixArt.
    """

    def __init__(self, module: ModuleSpec, config: Any) -> None:
        super().__init__()
        size = module.hidden_size
        self._module = module
        self.patches = torch.nn.Linear(patch_values(module), size)
        self.time_in = torch.nn.Linear(2 * _FREQUENCIES, size)
        self.time_out = torch.nn.Linear(size, size)
        self.time_shared: torch.nn.Linear | None = None
        if module.layer.modulation is Modulation.TABLE:
            self.time_shared = torch.nn.Linear(size, MODULATIONS * size)
        self.text_in: torch.nn.Linear | None = None
        self.text_out: torch.nn.Linear | None = None
        if module.input_size is not None:
            self.text_in = torch.nn.Linear(module.input_size, size)
            self.text_out = torch.nn.Linear(size, size)
        initialize_linears(self, config)

    def forward(
        self, batch: Mapping[str, Any], clips: ClipBatch, features: tuple[Tensor, ...]
    ) -> Tensor:
        """Rows [N * k + T + S, 1, H] of a batch and its prompts' features [tokens, prompts, W]."""
        rows = [self._time(batch["timesteps"])]
        made = sum(one.shape[0] * one.shape[1] for one in features)
        if made != sum(clips.prompts):
            raise ConfigError(
                f"module {self._module.name!r}: {len(features)} passes make {made} text features "
                f"and the prompts have {sum(clips.prompts)} tokens; plan with the metadata of this "
                "microbatch"
            )
        if features:
            rows.append(self._text(items_in_a_row(features)))
        weight = self.patches.weight
        clips_CTYX = noised_clips(batch, weight.device)
        noised = torch.cat([in_patches(one, self._module) for one in clips_CTYX])
        places = sinusoids(patch_places(clips.sizes, weight.device), weight.shape[0])
        rows.append(self.patches(noised.to(weight.dtype)) + places.to(weight.dtype))
        return torch.cat(rows)[:, None]

    def _time(self, times_N: Tensor) -> Tensor:
        """The time vectors of each clip, [N * k, H]."""
        weight = self.time_in.weight
        waves = sinusoids((times_N * _TIME_SCALE)[:, None], weight.shape[1]).to(weight.dtype)
        time_NH: Tensor = self.time_out(functional.silu(self.time_in(waves)))
        if self.time_shared is None:
            return time_NH
        shared = self.time_shared(functional.silu(time_NH))
        return torch.cat([time_NH, shared], dim=1).view(-1, time_NH.shape[1])

    def _text(self, features_TW: Tensor) -> Tensor:
        if self.text_in is None or self.text_out is None:
            return features_TW
        inner = functional.gelu(self.text_in(features_TW), approximate="tanh")
        out: Tensor = self.text_out(inner)
        return out


class DiffusionHead(torch.nn.Module):
    """Patches back to values: a norm, modulated by the time embedding, and a linear."""

    def __init__(self, module: ModuleSpec, config: Any) -> None:
        super().__init__()
        size = module.hidden_size
        self.norm = PlainNorm(config, size, config.layernorm_epsilon)
        self.modulation: torch.nn.Parameter | torch.nn.Linear
        if module.layer.modulation is Modulation.TABLE:
            table = torch.nn.Parameter(torch.empty(2, size, dtype=config.params_dtype))
            config.init_method(table.data)
            self.modulation = table
        else:
            self.modulation = torch.nn.Linear(size, 2 * size)
        self.values = torch.nn.Linear(size, patch_values(module))
        initialize_linears(self, config)

    def forward(self, patches_SBH: Tensor, time_NH: Tensor, lengths: Sequence[int]) -> Tensor:
        """The velocity of every patch, [S, 1, values]."""
        if isinstance(self.modulation, torch.nn.Parameter):
            vectors_NKH = time_NH[:, None] + self.modulation
        else:
            vectors_NKH = self.modulation(functional.silu(time_NH)).view(len(time_NH), 2, -1)
        shift_NH, scale_NH = vectors_NKH.unbind(1)
        velocity: Tensor = self.values(
            modulated(self.norm(patches_SBH), shift_NH, scale_NH, lengths)
        )
        return velocity


def initialize_linears(module: torch.nn.Module, config: Any) -> None:
    """Weights as Megatron's config draws them, biases zero."""
    for one in module.modules():
        if isinstance(one, torch.nn.Linear):
            config.init_method(one.weight.data)
            torch.nn.init.zeros_(one.bias)


def patch_values(module: ModuleSpec) -> int:
    """Values of one patch: one frame of `patch_size` squared pixels in every channel."""
    return module.image_channels * (module.patch_size or 1) ** 2


def in_patches(clip_CTYX: Tensor, module: ModuleSpec) -> Tensor:
    """A clip's patches [T * Y/p * X/p, C * p * p], frame by frame, row by row."""
    patch = module.patch_size or 1
    channels, frames, height, width = clip_CTYX.shape
    cut = clip_CTYX.reshape(channels, frames, height // patch, patch, width // patch, patch)
    return cut.permute(1, 2, 4, 0, 3, 5).reshape(-1, patch_values(module))


def noised_clips(batch: Mapping[str, Any], device: torch.device) -> list[Tensor]:
    """``(1 - t) * clip + t * noise`` of every clip; the clips as they are without noise.

    Clips and noise may be on the host, where they are left: two stages of a pass work on them.
    """
    clips = [one.to(device) for one in batch["clips"]]
    noise: Sequence[Tensor] | None = batch.get("noise")
    if noise is None:
        return clips
    times: Tensor = batch["timesteps"]
    return [
        torch.lerp(clip, one.to(device), time)
        for clip, one, time in zip(clips, noise, times, strict=True)
    ]


def velocity_loss(velocity_SP: Tensor, batch: Mapping[str, Any], module: ModuleSpec) -> Tensor:
    """Mean squared error of each patch's velocity, [S], in single precision at least."""
    device = velocity_SP.device
    target_SP = torch.cat(
        [
            in_patches(noise.to(device) - clip.to(device), module)
            for clip, noise in zip(batch["clips"], batch["noise"], strict=True)
        ]
    )
    exact = torch.promote_types(velocity_SP.dtype, torch.float32)
    return (velocity_SP.to(exact) - target_SP.to(exact)).square().mean(dim=1)


def patch_places(sizes: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """Frame, row and column of every patch, [S, 3]."""
    places = [
        torch.cartesian_prod(*(torch.arange(size, device=device) for size in clip))
        for clip in sizes
    ]
    return torch.cat(places).float()


def sinusoids(places_SA: Tensor, width: int) -> Tensor:
    """Sines and cosines of every axis side by side, [S, width], zeros where they do not reach."""
    rows, axes = places_SA.shape
    count = width // (2 * axes)
    steps = torch.arange(count, device=places_SA.device, dtype=torch.float32) / max(1, count)
    angles = places_SA.float()[..., None] * torch.exp(-math.log(_LONGEST_PERIOD) * steps)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).view(rows, -1)
    return functional.pad(waves, (0, width - waves.shape[1]))


def _check(setting: ChunkSetting) -> None:
    """Refuse what a diffusion transformer of chunks cannot be, by name."""
    module, layer = setting.module, setting.module.layer
    sizes = (layer.context_size, module.kv_groups)
    if sizes != (module.hidden_size, module.attention_heads):
        raise ConfigError(
            f"module {module.name!r}: context_size {layer.context_size} and kv_groups "
            f"{module.kv_groups}; Megatron's cross-attention reads hidden_size "
            f"{module.hidden_size} with as many groups as heads, {module.attention_heads}. Set "
            "input_size to what the text encoder hands on"
        )
    refused = {
        "modulation": layer.modulation is None,
        "rotary": bool(layer.rotary),
        "positions": layer.positions > 0,
        "window": layer.window is not None,
        "experts": layer.experts is not None,
        "cross_attention_layers": bool(layer.cross_attention_layers),
        "tap_layers": bool(layer.tap_layers),
    }
    for what, wrong in refused.items():
        if wrong:
            raise ConfigError(
                f"module {module.name!r}: layer option {what} is {getattr(layer, what)!r}; "
                "diffusion chunks are built with modulation, positions as sinusoids, and every "
                "layer alike"
            )
    if setting.config.sequence_parallel:
        raise ConfigError(
            f"module {module.name!r}: diffusion chunks run without sequence parallelism; "
            f"set sequence_parallel to False in overrides[{module.name!r}]"
        )
