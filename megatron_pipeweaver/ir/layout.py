"""Where a model's layers live: modality modules cut into chunks over the pipeline ranks.

A module with K segments is cut into ``pipeline_size * K`` *stages* of consecutive layers; stage s
is one *model chunk* on rank ``s mod pipeline_size`` (paper, section 3). On each rank the chunk
list is the sum of all modules' segments, modules in forward order: encoders are extra interleaved
virtual stages. Chunks never move during training.

    pipeline_size 2, vision K = 2, language K = 1      rank 0: vision0 vision2 language0
                                                       rank 1: vision1 vision3 language1
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLayout:
    """One module's cut: `layers[s]` consecutive layers in stage s; a stage may hold none."""

    module: str
    segments: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.segments < 1 or not self.layers or len(self.layers) % self.segments:
            raise ConfigError(
                f"layout of module {self.module!r}: {len(self.layers)} stages do not make "
                f"{self.segments} segments; give pipeline_size * segments stages"
            )
        if min(self.layers) < 0:
            raise ConfigError(f"layout of module {self.module!r}: a stage has fewer than 0 layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlace:
    """One chunk on one rank.

    `virtual_stage` is its index in the rank's chunk list (Megatron's ``vp_stage``); `segment` its
    index within its module; `first_layer` the module-global index of its first layer.
    """

    module: str
    segment: int
    stage: int
    virtual_stage: int
    first_layer: int
    layers: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """All modules' cuts, in forward order."""

    pipeline_size: int
    modules: tuple[ModuleLayout, ...]

    def __post_init__(self) -> None:
        if self.pipeline_size < 1 or not self.modules:
            raise ConfigError("chunk layout: needs at least one rank and one module")
        names = [one.module for one in self.modules]
        if len(set(names)) != len(names):
            raise ConfigError(f"chunk layout: module names repeat: {names}; name each module once")
        for one in self.modules:
            if len(one.layers) != self.pipeline_size * one.segments:
                raise ConfigError(
                    f"layout of module {one.module!r}: {len(one.layers)} stages; "
                    f"{self.pipeline_size} ranks x {one.segments} segments make "
                    f"{self.pipeline_size * one.segments}"
                )

    @property
    def virtual_size(self) -> int:
        """Chunks per rank: the sum of all modules' segments (Megatron's virtual pipeline size)."""
        return sum(one.segments for one in self.modules)

    def chunks_of_rank(self, rank: int) -> tuple[ChunkPlace, ...]:
        """The chunk list of pipeline rank `rank`, by virtual stage."""
        if not 0 <= rank < self.pipeline_size:
            raise ConfigError(f"rank {rank} is not one of {self.pipeline_size} pipeline ranks")
        places: list[ChunkPlace] = []
        for one in self.modules:
            for segment in range(one.segments):
                stage = segment * self.pipeline_size + rank
                places.append(
                    ChunkPlace(
                        module=one.module,
                        segment=segment,
                        stage=stage,
                        virtual_stage=len(places),
                        first_layer=sum(one.layers[:stage]),
                        layers=one.layers[stage],
                        is_first=stage == 0,
                        is_last=stage == len(one.layers) - 1,
                    )
                )
        return tuple(places)

    def virtual_stage(self, module: str, stage: int) -> int:
        """The index, in its rank's chunk list, of `stage` of `module`."""
        before = 0
        for one in self.modules:
            if one.module == module:
                if not 0 <= stage < len(one.layers):
                    raise ConfigError(
                        f"layout of module {module!r}: no stage {stage}; it has {len(one.layers)}"
                    )
                return before + stage // self.pipeline_size
            before += one.segments
        raise ConfigError(f"the layout has no module {module!r}")


def layers_text(layout: ChunkLayout) -> str:
    """``vision=16:16:16:15,language=8:8:8:8``: every module's layers per stage."""
    return ",".join(f"{one.module}={':'.join(map(str, one.layers))}" for one in layout.modules)
