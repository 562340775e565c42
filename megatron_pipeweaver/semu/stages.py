"""What a stage is made of: subgraphs, and how often each one stands in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_pipeweaver.ir.lmm import ModuleKind, ModuleSpec
from megatron_pipeweaver.semu.architecture import layer_groups, layer_spec
from megatron_pipeweaver.semu.heads import (
    final_norm,
    patch_embedding,
    patch_unembedding,
    projector,
    token_embedding,
    vocabulary_head,
)
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.layers import transformer_layer
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
    if stage.is_first:
        parts.append(Part(_EMBEDDINGS[module.kind](module, load, options), 1, False))
    for spec, copies in layer_groups(module, stage.first_layer, stage.layers):
        parts.append(Part(transformer_layer(spec, load, options), copies, True))
    taps = sum(
        stage.first_layer <= layer < stage.first_layer + stage.layers
        for layer in module.layer.tap_layers
    )
    if taps:
        parts.append(Part(projector(module, load, options), taps, False))
    if stage.is_last:
        parts.append(Part(final_norm(module, layer_spec(module), load, options), 1, False))
        parts.extend(_output_parts(module, stage, load, options))
    return tuple(parts)


def _output_parts(
    module: ModuleSpec, stage: StageShape, load: Load, options: RunOptions
) -> Iterator[Part]:
    if module.output_size is not None and load.output_tokens:
        yield Part(projector(module, load, options), 1, False)
    if module.kind is ModuleKind.LANGUAGE and module.vocab_size is not None:
        shares = module.tied_embeddings and stage.is_first
        yield Part(vocabulary_head(module, load, options, shares_embedding=shares), 1, False)
    if module.kind is ModuleKind.DIFFUSION:
        yield Part(patch_unembedding(module, load, options), 1, False)
