"""A small text-to-video model and its batches."""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, Modulation, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import initialize_by_name

VOCABULARY = 16
OPTIONS = ModelOptions(
    params_dtype=torch.float64,
    max_sequence_length=16,
    initialize=partial(initialize_by_name, seed=5),
    common={"init_method_std": 0.2},
)
PROMPTS = (3, 5, 5, 2)


def text_to_video(
    *,
    modulation: Modulation = Modulation.TABLE,
    frozen: bool = False,
    projected: bool = True,
    text_layers: int = 2,
    video_layers: int = 3,
) -> ModelSpec:
    """`projected`: whether the prompts' features come in a width of their own."""
    text = ModuleSpec(
        name="text",
        kind=ModuleKind.TEXT,
        layers=text_layers,
        hidden_size=8,
        ffn_hidden_size=12,
        attention_heads=2,
        kv_groups=1,
        frozen=frozen,
        gated_mlp=True,
        vocab_size=VOCABULARY,
        output_size=None if projected else 12,
    )
    video = ModuleSpec(
        name="video",
        kind=ModuleKind.DIFFUSION,
        layers=video_layers,
        hidden_size=12,
        ffn_hidden_size=20,
        attention_heads=2,
        kv_groups=2,
        after=("text",),
        input_size=8 if projected else None,
        patch_size=2,
        image_channels=3,
        layer=LayerOptions(context_size=12, modulation=modulation, qk_norm=True),
    )
    return ModelSpec(name="videos", modules=(text, video))


def clip_batch(clips: int, *, prompts: Sequence[int] = PROMPTS, seed: int = 0) -> dict[str, Any]:
    """One microbatch of `clips` clips of different lengths and shapes, with their prompts."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [(3, 1 + (seed + index) % 3, 2, 4) for index in range(clips)]

    def values(size: Sequence[int]) -> Tensor:
        return torch.randn(tuple(size), generator=draw, dtype=torch.float64)

    return {
        "clips": tuple(values(size) for size in sizes),
        "noise": tuple(values(size) for size in sizes),
        "timesteps": torch.rand(clips, generator=draw, dtype=torch.float64),
        "prompts": tuple(
            torch.randint(0, VOCABULARY, (length,), generator=draw) for length in prompts[:clips]
        ),
        "loss_mask": torch.ones(1, sum(size[1] * 2 for size in sizes), dtype=torch.float64),
    }


def describe(microbatch: Mapping[str, Any]) -> MicrobatchMetadata:
    """Metadata off the tensors' shapes."""
    patches = tuple(clip.shape[1] * 2 for clip in microbatch["clips"])
    prompts = tuple(Item(units=len(one), tokens=len(one)) for one in microbatch["prompts"])
    return MicrobatchMetadata(
        sequence_length=sum(patches),
        document_lengths=patches,
        items={"text": prompts} if prompts else {},
    )


def random_clips(rng: random.Random, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Microbatches with 1 to 4 clips each; some of them without prompts."""
    made = []
    for _ in range(rng.randint(1, 5)):
        prompts = rng.choice([PROMPTS, (4, 4, 4, 4), ()])
        one = clip_batch(rng.randint(1, 4), prompts=prompts, seed=rng.randrange(10**6))
        for name in ("clips", "noise"):
            one[name] = tuple(values.to(dtype) for values in one[name])
        made.append(one)
    return made
