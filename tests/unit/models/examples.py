"""A small vision-language model, its batches, and the plainest way to run its chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.plan import PassPayload, PlanPass
from megatron_pipeweaver.ir.problem import PassKey
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import global_parameters, initialize_by_name

IMAGE = 40
VOCABULARY = 32
TOKENS_PER_IMAGE = 4

TOKENS_PER_SOUND = 9
_ENCODERS = {"vision": ("images", TOKENS_PER_IMAGE), "audio": ("sounds", TOKENS_PER_SOUND)}
"""Keys of a microbatch, and tokens of an item, by module."""

OPTIONS = ModelOptions(
    params_dtype=torch.float64,
    max_sequence_length=64,
    image_size=4,
    image_token_id=IMAGE,
    initialize=partial(initialize_by_name, seed=3),
    common={"init_method_std": 0.2},
)


def vision_language(
    *, tied: bool = False, frozen: bool = False, vision_layers: int = 3, language_layers: int = 5
) -> ModelSpec:
    vision = ModuleSpec(
        name="vision",
        kind=ModuleKind.VISION,
        layers=vision_layers,
        hidden_size=8,
        ffn_hidden_size=12,
        attention_heads=2,
        kv_groups=2,
        frozen=frozen,
        output_size=12,
        projector_hidden_size=10,
        patch_size=2,
    )
    language = ModuleSpec(
        name="language",
        kind=ModuleKind.LANGUAGE,
        layers=language_layers,
        hidden_size=12,
        ffn_hidden_size=20,
        attention_heads=2,
        kv_groups=1,
        after=("vision",),
        gated_mlp=True,
        vocab_size=VOCABULARY,
        tied_embeddings=tied,
    )
    return ModelSpec(name="small", modules=(vision, language))


def language_only(*, layers: int) -> ModelSpec:
    """The backbone alone."""
    backbone = vision_language(language_layers=layers).backbone
    return ModelSpec(name="text", modules=(replace(backbone, after=()),))


def cut(pipeline_size: int, **layers: Sequence[int]) -> ChunkLayout:
    """A layout with these layers per stage."""
    return ChunkLayout(
        pipeline_size=pipeline_size,
        modules=tuple(
            ModuleLayout(module=name, segments=len(one) // pipeline_size, layers=tuple(one))
            for name, one in layers.items()
        ),
    )


def batch(images: int, *, samples: int = 1, text: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """One microbatch; its images are spread over its samples, between text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (samples * text,), generator=generator).tolist()
    rows: list[list[int]] = [tokens[i * text : (i + 1) * text] for i in range(samples)]
    for image in range(images):
        row = rows[image % samples]
        at = (3 * image) % text
        while at < len(row) and row[at] == IMAGE:
            at += 1
        row[at:at] = [IMAGE] * TOKENS_PER_IMAGE
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {
        "tokens": padded,
        "labels": torch.randint(0, VOCABULARY, padded.shape, generator=generator),
        "loss_mask": (torch.rand(padded.shape, generator=generator) < 0.8).double(),
        "images": torch.randn(images, 3, 4, 4, generator=generator, dtype=torch.float64),
    }


def describe(microbatch: Mapping[str, Any]) -> MicrobatchMetadata:
    """Metadata off the tensors' shapes; an image has as many patches as tokens."""
    samples, length = microbatch["tokens"].shape
    counts = {name: len(microbatch.get(key, ())) for name, (key, _) in _ENCODERS.items()}
    return MicrobatchMetadata(
        sequence_length=length,
        samples=samples,
        items={
            name: (Item(units=tokens, tokens=tokens),) * counts[name]
            for name, (_, tokens) in _ENCODERS.items()
            if counts[name]
        },
    )


def one_pass(
    module: str, start: int, stop: int, sub_microbatch: int = 0, after: Sequence[str] = ()
) -> PlanPass:
    return PlanPass(
        key=PassKey(0, module, sub_microbatch),
        stages=1,
        after=tuple(PassKey(0, one, index) for index, one in enumerate(after)),
        frozen=False,
        payload=PassPayload(item_start=start, item_stop=stop, hidden_shape=(), output_shape=()),
    )


class Model:
    """All ranks' chunks in one process, stage after stage."""

    def __init__(
        self, spec: ModelSpec, layout: ChunkLayout, groups: Any, options: ModelOptions = OPTIONS
    ) -> None:
        self.layout = layout
        self.ranks = [
            build_chunks(spec, layout, options, pg_collection=groups, rank=rank)
            for rank in range(layout.pipeline_size)
        ]

    @property
    def chunks(self) -> list[ModelChunk]:
        return [chunk for rank in self.ranks for chunk in rank]

    def stages(self, module: str) -> list[ModelChunk]:
        mine = [chunk for chunk in self.chunks if chunk.place.module == module]
        return sorted(mine, key=lambda chunk: chunk.place.stage)

    def run(self, microbatch: Mapping[str, Any], sub_microbatch: int = 100) -> Tensor:
        """The backbone's output; encoders work on so many items a pass."""
        *encoders, backbone = (one.module for one in self.layout.modules)
        features, sources = [], []
        for module in encoders:
            count = self.stages(module)[0].count_items(microbatch)
            for start in range(0, count, sub_microbatch):
                items = (start, min(start + sub_microbatch, count))
                features.append(self._through(module, microbatch, None, items))
                sources.append(module)
        return self._through(backbone, microbatch, features, (0, 1), sources)

    def loss(self, microbatch: Mapping[str, Any], sub_microbatch: int = 100) -> Tensor:
        losses = self.run(microbatch, sub_microbatch)
        return (losses * microbatch["loss_mask"]).sum() / microbatch["loss_mask"].sum()

    def _through(
        self,
        module: str,
        microbatch: Mapping[str, Any],
        tensors: Any,
        items: tuple[int, int],
        after: Sequence[str] = (),
    ) -> Tensor:
        for chunk in self.stages(module):
            chunk.set_pass(one_pass(module, *items, after=after))
            chunk.set_input_tensor(tensors)
            tensors = chunk(microbatch)
        return tensors

    def gradients(self) -> dict[str, Tensor]:
        """By global name; the two copies of a tied embedding are summed."""
        found: dict[str, Tensor] = {}
        for name, parameter in global_parameters(self.chunks):
            if self.chunks[0].share_embeddings_and_output_weights:
                name = name.replace("output_layer", "embedding.word_embeddings")
            if parameter.grad is not None:
                found[name] = found[name] + parameter.grad if name in found else parameter.grad
        return found
