"""Whole chunks: a module on one pipeline rank, built as for training.

A ViT with its patch embedding and projector; a language model with its token embedding, in which
image embeddings are placed, its head and the vocabulary-parallel cross entropy; a diffusion model
with what it embeds and its head and loss. Calibration never sees them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.semu_accuracy.chunks import CASES, CONTEXT, LAYERS, ChunkCase, load_of
from benchmarks.semu_accuracy.work import Chunk, Pass, Size
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.runtime.offload import HostOffload
from megatron_pipeweaver.semu.interface import Load, StageShape

IMAGE_TOKEN = -200
PATCHES_PER_TOKEN = 4
IMAGE_SHARE = 4
"""One in so many tokens of the language model is an image's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeCase:
    """What whole modules have besides their layers, and the sizes that they are held to."""

    vocabulary: int
    vision: tuple[Size, ...]
    language: tuple[Size, ...]
    diffusion: tuple[Size, ...]


WHOLE = {
    "cpu": WholeCase(
        vocabulary=4096,
        vision=((36, 6), (64, 3), (100, 2), (144, 1), (196, 1), (144, 2)),
        language=((80, 1), (112, 1), (160, 1), (192, 1), (224, 1), (288, 1)),
        diffusion=((81, 1), (144, 1), (169, 1), (225, 1)),
    ),
    "cuda": WholeCase(
        vocabulary=32768,
        vision=((576, 12), (1024, 6), (1600, 4), (2704, 3)),
        language=((2560, 1), (3072, 1), (1024, 3), (1536, 2)),
        diffusion=((2560, 1), (3584, 1), (4608, 1), (5120, 1)),
    ),
}


def whole_chunks(device: str, *, small: bool) -> list[tuple["WholeChunk", tuple[Size, ...]]]:
    """The whole chunks of a device, each with its sizes; only the first where it is `small`."""
    case = WHOLE[device]
    layers = {one.module.kind: one for one in CASES[device]}
    found: list[tuple[WholeChunk, tuple[Size, ...]]] = []
    for kind, sizes in (
        (ModuleKind.VISION, case.vision),
        (ModuleKind.LANGUAGE, case.language),
        (ModuleKind.DIFFUSION, case.diffusion),
    ):
        chunk = WholeChunk(models(layers, case.vocabulary)[kind], kind, device)
        found.append((chunk, sizes[:1] if small else sizes))
    return found


def models(layers: Mapping[ModuleKind, ChunkCase], vocabulary: int) -> dict[ModuleKind, ModelSpec]:
    """The models that modules of these layers stand in."""
    vision, language, diffusion = (
        layers[kind].module
        for kind in (ModuleKind.VISION, ModuleKind.LANGUAGE, ModuleKind.DIFFUSION)
    )
    vision = replace(
        vision,
        output_size=language.hidden_size,
        projector_hidden_size=language.hidden_size,
        patch_size=14,
        patches_per_token=PATCHES_PER_TOKEN,
    )
    language = replace(language, after=("vision",), vocab_size=vocabulary)
    diffusion = replace(diffusion, input_size=language.hidden_size, patch_size=2, image_channels=16)
    seeing = ModelSpec(name="seeing", modules=(vision, language))
    return {
        ModuleKind.VISION: seeing,
        ModuleKind.LANGUAGE: seeing,
        ModuleKind.DIFFUSION: ModelSpec(name="drawing", modules=(diffusion,)),
    }


class WholeChunk(Chunk):
    """The module of one kind of `model`, whole."""

    stage = StageShape(layers=LAYERS, is_first=True, is_last=True)

    def __init__(self, model: ModelSpec, kind: ModuleKind, device: str) -> None:
        super().__init__(device)
        self.module = next(one for one in model.modules if one.kind is kind)
        self.name = f"whole {self.module.name}"
        self._model = model
        # Images of a ViT of learned positions have one size, so it is built for each.
        self._built: Callable[[int], ModelChunk] = lru_cache(partial(build, model, kind, device))

    def _chunk(self, size: Size) -> ModelChunk:
        sized = self.module.kind is ModuleKind.VISION
        return self._built(math.isqrt(size[0]) * (self.module.patch_size or 1) if sized else 224)

    def load(self, size: Size) -> Load:
        """What SEMU is told of the work at `size`."""
        tokens = size[0] * size[1] // self.module.patches_per_token
        return replace(load_of(self.module, size), output_tokens=tokens)

    def parameters(self, size: Size) -> Iterator[torch.nn.Parameter]:
        """Those of the module."""
        yield from self._chunk(size).parameters()

    def made(self, size: Size, strategy: LayerStrategy, offload: HostOffload | None = None) -> Pass:
        """A forward at `size`: a microbatch and what producers hand over in, output or loss out."""
        chunk = self._chunk(size)
        batch, inputs = _BATCHES[self.module.kind](self, size)
        tensors = [one for value in batch.values() for one in _tensors(value)]

        def run() -> torch.Tensor:
            chunk.set_strategy(strategy.value, offload)
            chunk.set_input_tensor(list(inputs))
            output: torch.Tensor = chunk(batch)
            return output

        owned = (batch["images"],) if "images" in batch else ()
        others = [one for one in (*tensors, *inputs) if not any(one is own for own in owned)]
        return Pass(run=run, owned=owned, given=tuple(others))


Batch = dict[str, Any]


def _images(chunk: WholeChunk, size: Size) -> tuple[Batch, tuple[torch.Tensor, ...]]:
    side = math.isqrt(size[0]) * (chunk.module.patch_size or 1)
    return {"images": chunk.random(size[1], chunk.module.image_channels, side, side)}, ()


def _tokens(chunk: WholeChunk, size: Size) -> tuple[Batch, tuple[torch.Tensor, ...]]:
    sequence, samples = size
    vocabulary = chunk.module.vocab_size or 1
    tokens = torch.randint(vocabulary, (samples, sequence), device=chunk.device)
    labels = torch.randint(vocabulary, (samples, sequence), device=chunk.device)
    seen = sequence // IMAGE_SHARE
    tokens[:, :seen] = IMAGE_TOKEN
    images = chunk.random(seen, samples, chunk.module.hidden_size).requires_grad_(True)
    return {"tokens": tokens, "labels": labels}, (images,)


def _clips(chunk: WholeChunk, size: Size) -> tuple[Batch, tuple[torch.Tensor, ...]]:
    """One clip of one frame, and its prompt's features."""
    module, patch = chunk.module, chunk.module.patch_size or 1
    rows = max(one for one in range(1, math.isqrt(size[0]) + 1) if size[0] % one == 0)
    shape = (module.image_channels, 1, rows * patch, size[0] // rows * patch)
    prompt = torch.zeros(CONTEXT, dtype=torch.long, device=chunk.device)
    features = chunk.random(CONTEXT, 1, module.input_size or module.hidden_size)
    return {
        "clips": (chunk.random(*shape),),
        "noise": (chunk.random(*shape),),
        "timesteps": torch.full((1,), 0.5, device=chunk.device, dtype=chunk.dtype),
        "prompts": (prompt,),
    }, (features.requires_grad_(True),)


_BATCHES: Mapping[
    ModuleKind, Callable[[WholeChunk, Size], tuple[Batch, tuple[torch.Tensor, ...]]]
] = {
    ModuleKind.VISION: _images,
    ModuleKind.LANGUAGE: _tokens,
    ModuleKind.DIFFUSION: _clips,
}


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def build(model: ModelSpec, kind: ModuleKind, device: str, image_size: int) -> ModelChunk:
    """The chunk of `kind` of `model` on one rank, as for training."""
    options = ModelOptions(
        params_dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        image_size=image_size,
        image_token_id=IMAGE_TOKEN,
        transformer_engine=False,
        common={
            "attention_softmax_in_fp32": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
        },
        overrides={"language": {"normalization": "RMSNorm", "add_bias_linear": False}},
    )
    layout = ChunkLayout(
        pipeline_size=1,
        modules=tuple(
            ModuleLayout(module=one.name, segments=1, layers=(one.layers,)) for one in model.modules
        ),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = build_chunks(model, layout, options, pg_collection=groups)
    chunk = next(one for one in chunks if one.module_spec.kind is kind)
    return chunk.train().to(device=device)
