"""Offline choices: sub-microbatch sizes B_i, segment counts K_i, layers per chunk (paper, 3)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec

PEAK_SHARE = Fraction(95, 100)
"""A sub-microbatch is large enough at this share of the best efficiency seen."""


def choose_sub_microbatch(times: Mapping[int, int]) -> int:
    """The smallest sub-microbatch size that keeps the device busy.

    Args:
        times: latency in nanoseconds of one module's forward and backward, by size in items.

    Returns:
        The smallest size whose items per nanosecond reach 95 % of the best among `times`.

    Raises:
        ConfigError: `times` is empty, or holds a size or a time below one.
    """
    if not times or min(times) < 1 or min(times.values()) < 1:
        raise ConfigError(
            f"sub-microbatch sizes: profile is {dict(times)}; give at least one size >= 1 with "
            "its time >= 1 ns"
        )
    efficiency = {size: Fraction(size, time) for size, time in times.items()}
    wanted = PEAK_SHARE * max(efficiency.values())
    return min(size for size, value in efficiency.items() if value >= wanted)


def choose_segments(
    module_times_ns: Mapping[str, int], limits: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Segments per module so that segment latencies match: ``K_i = floor(T_i / T_1)``.

    Args:
        module_times_ns: T_i, the latency of each module at its sub-microbatch size.
        limits: the most segments that a module can be cut into (see `segment_limits`).

    Returns:
        K_i >= 1 by module, in the order of `module_times_ns`; the fastest module has 1.

    Raises:
        ConfigError: no module is given, or a time is below one.
    """
    if not module_times_ns or min(module_times_ns.values()) < 1:
        raise ConfigError(
            f"segments: module times are {dict(module_times_ns)}; give every module a time >= 1 ns"
        )
    fastest = min(module_times_ns.values())
    most = limits or {}
    return {
        name: max(1, min(time // fastest, most.get(name, time)))
        for name, time in module_times_ns.items()
    }


def segment_limits(model: ModelSpec, pipeline_size: int) -> dict[str, int]:
    """The most segments per module that leave no chunk of several segments without a layer."""
    return {module.name: max(1, module.layers // pipeline_size) for module in model.modules}


def cut_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage: as even as can be, the longer stages first, zeros where layers run out.

    The last stage also holds the head (or the projector), so it is the first to go short.

    Raises:
        ConfigError: `layers` is negative or `stages` is below one.
    """
    if layers < 0 or stages < 1:
        raise ConfigError(f"cut {layers} layers into {stages} stages: need >= 0 and >= 1")
    small, longer = divmod(layers, stages)
    return tuple(small + (stage < longer) for stage in range(stages))


def make_layout(model: ModelSpec, pipeline_size: int, segments: Mapping[str, int]) -> ChunkLayout:
    """Cut every module into ``pipeline_size * segments`` chunks.

    Args:
        model: the modules, in forward order.
        pipeline_size: pipeline ranks, P.
        segments: K_i by module; a module that is not named has one segment. One segment may leave
            chunks without layers (more ranks than layers); several may not.

    Returns:
        The layout; module order as in `model`.

    Raises:
        ConfigError: `segments` names an unknown module, or asks for more chunks than layers.
    """
    names = [module.name for module in model.modules]
    unknown = sorted(set(segments) - set(names))
    if unknown:
        raise ConfigError(f"segments: model {model.name!r} has no module {unknown}; it has {names}")
    cuts = []
    for module in model.modules:
        wanted = segments.get(module.name, 1)
        most = max(1, module.layers // pipeline_size)
        if not 1 <= wanted <= most:
            raise ConfigError(
                f"segments: module {module.name!r} has {module.layers} layers, which "
                f"{pipeline_size} pipeline ranks cannot cut into {wanted} segments; "
                f"choose 1 to {most}"
            )
        cuts.append(
            ModuleLayout(
                module=module.name,
                segments=wanted,
                layers=cut_layers(module.layers, pipeline_size * wanted),
            )
        )
    return ChunkLayout(pipeline_size=pipeline_size, modules=tuple(cuts))


def cut_as_given(
    layout: ChunkLayout, model: ModelSpec, layers: Mapping[str, tuple[int, ...]]
) -> ChunkLayout:
    """`layout` with the stages of some modules as somebody has chosen them.

    Args:
        layout: the other modules' cut.
        model: the modules.
        layers: layers per stage, by module; pipeline ranks times segments of them.

    Raises:
        ConfigError: a module is not cut into whole segments, or has another number of layers.
    """
    cuts = []
    for one in layout.modules:
        given = layers.get(one.module, one.layers)
        segments, rest = divmod(len(given), layout.pipeline_size)
        whole = model.module(one.module).layers
        if rest or not segments:
            raise ConfigError(
                f"layers of module {one.module!r}: {len(given)} stages on {layout.pipeline_size} "
                "pipeline ranks; give as many per segment as there are ranks"
            )
        if sum(given) != whole:
            raise ConfigError(
                f"layers of module {one.module!r}: {sum(given)} in {len(given)} stages; "
                f"it has {whole}"
            )
        if segments > 1 and not all(given):
            raise ConfigError(
                f"layers of module {one.module!r}: a stage without any, and {segments} segments; "
                "give every stage one at least, or give fewer segments"
            )
        cuts.append(ModuleLayout(module=one.module, segments=segments, layers=given))
    return ChunkLayout(pipeline_size=layout.pipeline_size, modules=tuple(cuts))
