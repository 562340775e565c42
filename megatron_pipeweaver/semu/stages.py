"""What a stage is made of: subgraphs, and how often each one stands in it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from megatron_pipeweaver.ir.layout import ModuleLayout
from megatron_pipeweaver.ir.lmm import ModuleKind, ModuleSpec
from megatron_pipeweaver.semu.architecture import layer_groups, layer_spec
from megatron_pipeweaver.semu.heads import (
    condition_embedding,
    final_norm,
    patch_embedding,
    patch_unembedding,
    projector,
    tied_vocabulary_head,
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


_SPLITS_CONTEXT = frozenset({ModuleKind.LANGUAGE, ModuleKind.DIFFUSION})
"""Backbones split their sequences over context-parallel ranks; encoders' items are not split."""


def splits_context(module: ModuleSpec) -> bool:
    """Whether context-parallel ranks share the sequences of `module`."""
    return module.kind in _SPLITS_CONTEXT


class Part(NamedTuple):
    """`copies` equal subgraphs, one behind the other; `is_layer` says they may be recomputed.

    `make` and `arguments` say which subgraph it is without building it.
    """

    make: Callable[..., Subgraph]
    arguments: tuple[Hashable, ...]
    copies: int
    is_layer: bool
    splits_context: bool

    def build(self, options: RunOptions) -> Subgraph:
        """The subgraph, on one rank; context-parallel ranks all run what does not split."""
        if not self.splits_context and options.parallel.context > 1:
            options = replace(options, parallel=replace(options.parallel, context=1))
        return self.make(*self.arguments, options)


def module_stages(cut: ModuleLayout) -> tuple[StageShape, ...]:
    """The stages that `cut` cuts a module into, in forward order."""
    starts = accumulate(cut.layers, initial=0)
    return tuple(
        StageShape(
            layers=layers,
            is_first=stage == 0,
            is_last=stage == len(cut.layers) - 1,
            first_layer=first_layer,
        )
        for stage, (layers, first_layer) in enumerate(zip(cut.layers, starts, strict=False))
    )


def stage_parts(module: ModuleSpec, stage: StageShape, load: Load) -> tuple[Part, ...]:
    """The subgraphs of one stage in forward order."""
    parts: list[Part] = []
    split = splits_context(module)
    if stage.is_first:
        parts.append(Part(_EMBEDDINGS[module.kind], (module, load), 1, False, split))
        if module.time_tokens:
            parts.append(Part(condition_embedding, (module, load), 1, False, False))
        if module.kind is ModuleKind.VISION:
            # As in CLIP and in Megatron's LLaVA, a ViT's own norm stands in front of its layers.
            parts.append(Part(final_norm, (module, layer_spec(module), load), 1, False, split))
    for spec, copies in layer_groups(module, stage.first_layer, stage.layers):
        parts.append(Part(transformer_layer, (spec, load), copies, True, split))
    taps = sum(
        stage.first_layer <= layer < stage.first_layer + stage.layers
        for layer in module.layer.tap_layers
    )
    if taps:
        parts.append(Part(projector, (module, load), taps, False, split))
    if stage.is_last:
        if module.kind is not ModuleKind.VISION:
            parts.append(Part(final_norm, (module, layer_spec(module), load), 1, False, split))
        parts.extend(_output_parts(module, stage, load))
    return tuple(parts)


def _output_parts(module: ModuleSpec, stage: StageShape, load: Load) -> Iterator[Part]:
    split = splits_context(module)
    if module.output_size is not None and load.output_tokens:
        yield Part(projector, (module, load), 1, False, split)
    if module.kind is ModuleKind.LANGUAGE and module.vocab_size is not None:
        shares = module.tied_embeddings and stage.is_first
        head = tied_vocabulary_head if shares else vocabulary_head
        yield Part(head, (module, load), 1, False, split)
    if module.kind is ModuleKind.DIFFUSION:
        yield Part(patch_unembedding, (module, load), 1, False, split)


def canonical_stage(module: ModuleSpec, stage: StageShape) -> StageShape:
    """A stage that costs as much as `stage`, the same for all that are alike.

    Where every layer is like every other, it does not matter which ones a stage holds.
    """
    options = module.layer
    differ = (
        options.full_attention_layers
        or options.cross_attention_layers
        or options.tap_layers
        or options.experts is not None
    )
    return stage if differ or not stage.first_layer else replace(stage, first_layer=0)
