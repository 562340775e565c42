"""A language model with two vision encoders: pictures, and spectrograms of another size."""

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.options import EncoderOptions
from tests.unit.models.examples import (
    IMAGE,
    OPTIONS,
    TOKENS_PER_IMAGE,
    TOKENS_PER_SOUND,
    VOCABULARY,
    vision_language,
)

SOUND = IMAGE + 1
TWO_ENCODERS = replace(
    OPTIONS,
    encoders={
        "vision": EncoderOptions(images="images", image_size=4, token_id=IMAGE),
        "audio": EncoderOptions(images="sounds", image_size=6, token_id=SOUND),
    },
)
_TOKENS = {IMAGE: TOKENS_PER_IMAGE, SOUND: TOKENS_PER_SOUND}


def vision_audio_language(*, frozen: bool = False) -> ModelSpec:
    """`frozen`: whether the ViT over spectrograms is trained."""
    vision, language = vision_language().modules
    audio = ModuleSpec(
        name="audio",
        kind=ModuleKind.VISION,
        layers=2,
        hidden_size=6,
        ffn_hidden_size=8,
        attention_heads=1,
        kv_groups=1,
        frozen=frozen,
        output_size=12,
        patch_size=2,
        image_channels=1,
    )
    backbone = replace(language, after=("vision", "audio"))
    return ModelSpec(name="multimodal", modules=(vision, audio, backbone))


def mixed_batch(images: int, sounds: int, *, text: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """One sample in which pictures and sounds take turns as they come."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shown = [IMAGE] * images + [SOUND] * sounds
    draw.shuffle(shown)
    row = [draw.randrange(VOCABULARY) for _ in range(text)]
    for one in shown:
        row += [one] * _TOKENS[one] + [draw.randrange(VOCABULARY)]
    size = (1, len(row))
    return {
        "tokens": torch.tensor([row]),
        "labels": torch.randint(0, VOCABULARY, size, generator=generator),
        "loss_mask": (torch.rand(size, generator=generator) < 0.8).double(),
        "images": torch.randn(images, 3, 4, 4, generator=generator, dtype=torch.float64),
        "sounds": torch.randn(sounds, 1, 6, 6, generator=generator, dtype=torch.float64),
    }


def random_mixes(rng: random.Random, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Microbatches with 0 to 4 pictures and 0 to 3 sounds each."""
    made = []
    for _ in range(rng.randint(1, 5)):
        one = mixed_batch(rng.randint(0, 4), rng.randint(0, 3), seed=rng.randrange(10**6))
        made.append({**one, **{name: one[name].to(dtype) for name in ("images", "sounds")}})
    return made
