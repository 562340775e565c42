"""What a stage is made of: subgraphs, and how often each one stands in it."""

from __future__ import annotations

from typing import NamedTuple

from megatron_pipeweaver.ir.lmm import ModuleKind, ModuleSpec
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.layers import (
    final_norm,
    patch_embedding,
    projector,
    token_embedding,
    transformer_layer,
    vocabulary_head,
)
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.work import Subgraph

_EMBEDDINGS = {
    ModuleKind.VISION: patch_embedding,
    ModuleKind.DIFFUSION: patch_embedding,
    ModuleKind.LANGUAGE: token_embedding,
    ModuleKind.TEXT: token_embedding,
}


class Part(NamedTuple):
    """`copies` equal subgraphs, one behind the other; `is_layer` says they may be recomputed."""

    graph: Subgraph
    copies: int
    is_layer: bool


def stage_parts(
    module: ModuleSpec, stage: StageShape, load: Load, options: RunOptions
) -> tuple[Part, ...]:
    """The subgraphs of one stage in forward order, on one rank."""
    parts: list[Part] = []
    spec = layer_spec(module)
    if stage.is_first:
        parts.append(Part(_EMBEDDINGS[module.kind](module, load, options), 1, False))
    if stage.layers:
        parts.append(Part(transformer_layer(spec, load, options), stage.layers, True))
    if stage.is_last:
        parts.append(Part(final_norm(module, spec, load, options), 1, False))
        if module.output_size is not None and load.output_tokens:
            parts.append(Part(projector(module, load, options), 1, False))
        if module.kind is ModuleKind.LANGUAGE and module.vocab_size is not None:
            parts.append(Part(vocabulary_head(module, load, options), 1, False))
    return tuple(parts)
