"""The quickstart's model and how it is trained: small enough for two cores, good enough to read.

The sizes are chosen so that the schedule matters: a full microbatch has work for the vision module
in several sub-microbatches, one of text alone has none, and the language model, the larger of the
two, is cut into two segments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from digits import IMAGE_CHANNELS, MAX_IMAGES, MODULE, VOCABULARY, TaskConfig

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Adam with warm-up and cosine decay, and what the planner is told.

    `init_std` is the standard deviation of the weight matrices' initial values: layers this narrow
    do not learn in this few steps from Megatron's default of 0.02. `activation_bytes` is what each
    rank may hold for activations: about half of what the fullest batches would hold if nothing
    were recomputed, so that schedules have to economise.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    iterations: int = 120
    learning_rate: float = 2.5e-3
    final_share: float = 0.05
    warmup: int = 10
    weight_decay: float = 0.05
    adam_beta2: float = 0.95
    init_std: float = 0.1
    search_seconds: float = 0.1
    activation_bytes: int = 20 << 20

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup < 0:
            raise ConfigError(
                f"recipe: iterations={self.iterations}, warmup={self.warmup}; need >= 1, >= 0"
            )

    @property
    def typical_images(self) -> int:
        """Images of a microbatch with half of those that fit."""
        return self.task.samples * MAX_IMAGES // 2

    @property
    def typical_sequence_length(self) -> int:
        """Tokens of a sequence with half of the images that fit, and a sum."""
        return MAX_IMAGES // 2 * (self.task.tokens_per_image + 2) + 8


RECIPE = Recipe()


def learning_rate(iteration: int, iterations: int, recipe: Recipe = RECIPE) -> float:
    """The learning rate of `iteration`, counted from 0, of `iterations`."""
    warm = min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, iteration / iterations)))
    return recipe.learning_rate * warm * (recipe.final_share + (1.0 - recipe.final_share) * cosine)


def model_spec() -> ModelSpec:
    """A ViT of 8 layers and a language model of 8 wider ones."""
    vision = ModuleSpec(
        name=MODULE,
        kind=ModuleKind.VISION,
        layers=8,
        hidden_size=64,
        ffn_hidden_size=128,
        attention_heads=4,
        kv_groups=4,
        patch_size=RECIPE.task.patch_size,
        image_channels=IMAGE_CHANNELS,
        projector_hidden_size=192,
        output_size=96,
    )
    language = ModuleSpec(
        name="language",
        kind=ModuleKind.LANGUAGE,
        layers=8,
        hidden_size=96,
        ffn_hidden_size=192,
        attention_heads=4,
        kv_groups=4,
        after=(MODULE,),
        vocab_size=len(VOCABULARY),
    )
    return ModelSpec(name="quickstart", modules=(vision, language))
