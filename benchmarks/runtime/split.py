r"""What a backward takes when its weight gradients run apart, against one in one piece.

    python -m benchmarks.runtime.split -o benchmarks/runtime/results/split.csv

Chunks of real megatron-core layers, two in the middle of a ViT and of a language model, in fp32.
Both backwards of one and the same chunk run by turns, split and whole first in turn.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when megatron-core is imported

import torch
from torch import Tensor

from benchmarks.semu_accuracy.chunks import one_rank
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.plugin.compat import default_pg_collection

_log = logging.getLogger("split")
LAYERS = (1, 2, 1)
"""Of either module, on three ranks; the one in the middle has layers alone."""
IMAGE, PIXELS, PATCH = 500, 56, 4
VOCABULARY = 512


def model(width: int) -> ModelSpec:
    """A ViT and a language model of this width."""
    common: dict[str, Any] = {"layers": sum(LAYERS), "attention_heads": 4, "kv_groups": 4}
    vision = ModuleSpec(
        name="vision",
        kind=ModuleKind.VISION,
        hidden_size=width,
        ffn_hidden_size=4 * width,
        output_size=width,
        patch_size=PATCH,
        **common,
    )
    language = ModuleSpec(
        name="language",
        kind=ModuleKind.LANGUAGE,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        after=("vision",),
        gated_mlp=True,
        vocab_size=VOCABULARY,
        **common,
    )
    return ModelSpec(name="split", modules=(vision, language))


def middle_chunks(width: int) -> list[ModelChunk]:
    """The chunks of the rank in the middle."""
    layout = ChunkLayout(
        pipeline_size=len(LAYERS),
        modules=tuple(
            ModuleLayout(module=name, segments=1, layers=LAYERS) for name in ("vision", "language")
        ),
    )
    options = ModelOptions(
        max_sequence_length=(PIXELS // PATCH) ** 2, image_size=PIXELS, image_token_id=IMAGE
    )
    groups = default_pg_collection()
    return build_chunks(model(width), layout, options, pg_collection=groups, rank=1)


def backward_ns(
    chunk: ModelChunk, microbatch: dict[str, Tensor], hidden: Tensor, *, split: bool
) -> tuple[int, int]:
    """Nanoseconds of one backward, and of the weight gradients that it left out."""
    chunk.zero_grad()
    chunk.set_strategy("keep", None)
    chunk.set_input_tensor([hidden.clone().requires_grad_()])
    with chunk.weight_gradients.leaving_out(split) as left:
        output = chunk(microbatch)
    gradient = torch.ones_like(output)
    started_ns = time.perf_counter_ns()
    output.backward(gradient)
    between_ns = time.perf_counter_ns()
    left.finish()
    return between_ns - started_ns, time.perf_counter_ns() - between_ns


def measured(chunk: ModelChunk, tokens: int, width: int, repeats: int) -> dict[str, Any]:
    """One row of the result."""
    hidden = torch.randn(tokens, 1, width)
    microbatch = {
        "images": torch.randn(1, 3, PIXELS, PIXELS),
        "tokens": torch.randint(0, IMAGE, (1, tokens)),
        "labels": torch.randint(0, IMAGE, (1, tokens)),
        "loss_mask": torch.ones(1, tokens),
    }
    whole, apart, weights = [], [], []
    for turn in range(repeats + 2):
        for split in (turn % 2 == 0, turn % 2 == 1):
            first_ns, second_ns = backward_ns(chunk, microbatch, hidden, split=split)
            if turn >= 2:  # the first ones fill caches
                (apart if split else whole).append(first_ns + (second_ns if split else 0))
                weights += [second_ns] if split else []
    return {
        "module": chunk.place.module,
        "width": width,
        "tokens": tokens,
        "whole_us": round(median(whole) / 1e3),
        "split_us": round(median(apart) / 1e3),
        "of_which_w_us": round(median(weights) / 1e3),
        "overhead_permille": round(1000 * (median(apart) / median(whole) - 1)),
    }


def rows(repeats: int) -> Iterator[dict[str, Any]]:
    """Modules, widths and lengths."""
    for width in (128, 256, 512):
        for chunk in middle_chunks(width):
            # A ViT works on whole images, 196 patches each.
            for tokens in (196,) if chunk.place.module == "vision" else (64, 128, 196):
                yield measured(chunk, tokens, width, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    with one_rank("cpu"):
        for row in rows(args.repeats):
            found.append(row)
            _log.info("%s", row)
    _log.info("median overhead: %d permille", median(one["overhead_permille"] for one in found))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
