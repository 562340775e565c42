"""Small models of `transformers`, saved with random weights, and what they make of a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

IMAGE = 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llava(text: str) -> Any:
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={"model_type": text, **TEXT},
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl(**changed: Any) -> Any:
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 24,
            "num_heads": 3,
            "mlp_ratio": 2,
            "patch_size": 4,
            "hidden_size": 32,
        },
        text_config={
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        **changed,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def save_random(model: Any, folder: Path) -> Path:
    """Saves a model of random weights whose norms and biases are no ones and zeros either."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn(one.shape, generator=generator) * 0.2 + (one.dim() == 1))
    model.eval().save_pretrained(folder)
    return folder


def qwen2_vl_logits(
    model: Any, tokens: torch.Tensor, images: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `transformers` makes of one document, and its positions in three axes."""
    grid = torch.tensor([[1, one.shape[1] // 4, one.shape[2] // 4] for one in images])
    is_image = (tokens == IMAGE).int()
    with torch.no_grad():
        found = model(
            input_ids=tokens,
            pixel_values=torch.cat([processed(one[None]) for one in images]) if images else None,
            image_grid_thw=grid if images else None,
            mm_token_type_ids=is_image,
        )
    positions, _ = model.model.get_rope_index(tokens, is_image, grid)
    return found.logits, positions


def processed(images: torch.Tensor, patch: int = 4, merge: int = 2) -> torch.Tensor:
    """Images as Qwen2-VL's processor lays them out: patch by patch, block by block, two frames."""
    count, colours, height, width = images.shape
    frames = images[:, None].expand(count, 2, colours, height, width)
    rows, columns = height // patch // merge, width // patch // merge
    cut_up = frames.reshape(count, 2, colours, rows, merge, patch, columns, merge, patch)
    ordered = cut_up.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(-1, colours * 2 * patch * patch)
