"""From a model and its cut to the chunks of a rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind
from megatron_pipeweaver.models.chunk import ChunkSetting, ModelChunk
from megatron_pipeweaver.models.configs import chunk_config, root_config
from megatron_pipeweaver.models.diffusion import DiffusionChunk
from megatron_pipeweaver.models.language import LanguageChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.text import TextChunk
from megatron_pipeweaver.models.vision import VisionChunk

_CHUNKS: Mapping[ModuleKind, Callable[[ChunkSetting], ModelChunk]] = {
    ModuleKind.VISION: VisionChunk,
    ModuleKind.LANGUAGE: LanguageChunk,
    ModuleKind.TEXT: TextChunk,
    ModuleKind.DIFFUSION: DiffusionChunk,
}
_ENCODERS: Mapping[ModuleKind, ModuleKind] = {
    ModuleKind.LANGUAGE: ModuleKind.VISION,
    ModuleKind.DIFFUSION: ModuleKind.TEXT,
}
"""Which backbones there are, and what encodes for them."""


@dataclass(frozen=True, slots=True)
class PipelinePosition:
    """A place in a pipeline without a communicator, where Megatron expects a process group."""

    position: int
    length: int

    def rank(self) -> int:
        """The pipeline rank."""
        return self.position

    def size(self) -> int:
        """The pipeline's length."""
        return self.length


def groups_of_rank(pg_collection: Any, rank: int, pipeline_size: int) -> Any:
    """`pg_collection` as pipeline rank `rank` would see it, without pipeline communication."""
    groups = copy.copy(pg_collection)
    groups.pp = PipelinePosition(rank, pipeline_size)
    groups.embd = None
    groups.pos_embd = None
    return groups


def build_chunks(
    model: ModelSpec,
    layout: ChunkLayout,
    options: ModelOptions,
    *,
    pg_collection: Any,
    rank: int | None = None,
) -> list[ModelChunk]:
    """The chunk list of one pipeline rank, in order of virtual stages.

    All chunks share one root config, on which Megatron writes its hooks. Without `rank`, the
    chunks are those of this process in its job: every rank of the job builds its own at the same
    point, and tied embeddings are made equal across the pipeline. With `rank`, they are that
    rank's, built apart from any job and without communication; the last copy of a tied embedding
    is zero until it is initialised (`parameters.initialize_by_name`).

    Args:
        model: the modules.
        layout: their cuts.
        options: how chunks are made.
        pg_collection: Megatron's process groups; its `pp` says who this process is.
        rank: whose chunks to build, if not this process's.

    Returns:
        One chunk per virtual stage, on the CPU or the current device, in training mode.

    Raises:
        ConfigError: layout and model do not fit each other, or the pipeline.
    """
    _check(model, layout)
    groups = pg_collection
    if rank is not None:
        groups = groups_of_rank(pg_collection, rank, layout.pipeline_size)
    elif groups.pp.size() != layout.pipeline_size:
        raise ConfigError(
            f"the layout is for {layout.pipeline_size} pipeline ranks and this job has "
            f"{groups.pp.size()}; make a layout for {groups.pp.size()}"
        )
    root = root_config(model, layout, options)
    cuts = {one.module: one for one in layout.modules}
    chunks = []
    for place in layout.chunks_of_rank(groups.pp.rank()):
        module = model.module(place.module)
        setting = ChunkSetting(
            model=model,
            module=module,
            place=place,
            root=root,
            config=chunk_config(module, cuts[module.name], place, options),
            options=options,
            groups=groups,
        )
        chunk = _CHUNKS[module.kind](setting)
        # Norms and convolutions come in float32 whatever the config says.
        chunk.to(options.params_dtype)
        if module.frozen:
            chunk.requires_grad_(False)
        chunks.append(chunk)
    if options.initialize is not None:
        options.initialize(chunks)
    return chunks


def _check(model: ModelSpec, layout: ChunkLayout) -> None:
    """Refuse what cannot be built, by name."""
    names = [module.name for module in model.modules]
    cuts = [one.module for one in layout.modules]
    if cuts != names:
        raise ConfigError(f"the layout's modules {cuts} are not those of the model, {names}")
    backbone = model.backbone
    if backbone.kind not in _ENCODERS:
        raise ConfigError(
            f"model {model.name!r}: the backbone {backbone.name!r} is of kind "
            f"{backbone.kind.value!r}; chunks are built for one of "
            f"{[kind.value for kind in _ENCODERS]}"
        )
    for module, cut in zip(model.modules, layout.modules, strict=True):
        where = f"model {model.name!r}, module {module.name!r}"
        if sum(cut.layers) != module.layers:
            raise ConfigError(f"{where}: {module.layers} layers, and {sum(cut.layers)} in its cut")
        if layout.pipeline_size == 1 and cut.segments > 1:
            raise ConfigError(
                f"{where}: {cut.segments} segments on one pipeline rank; one segment holds "
                "everything there"
            )
        if module.layer.latent is not None and module.kind is not ModuleKind.LANGUAGE:
            raise ConfigError(
                f"{where}: latent attention in a module of kind {module.kind.value!r}; only "
                "language models' chunks have it"
            )
    _check_encoders(model)


def _check_encoders(model: ModelSpec) -> None:
    """Refuse modules that do not fit each other."""
    backbone = model.backbone
    kind = _ENCODERS[backbone.kind]
    for module in model.modules[:-1]:
        where = f"model {model.name!r}, module {module.name!r}"
        if module.kind is not kind or module.after:
            raise ConfigError(
                f"{where}: is of kind {module.kind.value!r} and consumes {list(module.after)}; a "
                f"{backbone.kind.value} backbone is fed by modules of kind {kind.value!r} that "
                "consume nothing"
            )
        width = module.output_size or module.hidden_size
        wanted = backbone.input_size or backbone.hidden_size
        if width != wanted:
            raise ConfigError(
                f"{where}: hands on {width} and {backbone.name!r} takes {wanted}; set output_size "
                f"of {module.name!r} to {wanted}"
            )
    if backbone.kind is ModuleKind.DIFFUSION and len(model.modules) > 2:
        raise ConfigError(
            f"model {model.name!r}: {len(model.modules) - 1} text encoders; a diffusion backbone "
            "reads the prompts of one"
        )
    if backbone.kind is ModuleKind.LANGUAGE and backbone.input_size is not None:
        raise ConfigError(
            f"model {model.name!r}, module {backbone.name!r}: input_size {backbone.input_size}; a "
            "language model takes embeddings of its own width, set output_size of its encoders"
        )
