"""What stage pairs of real layers hold between forward and backward, against SEMU's plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.runtime.activations import ActivationMeter
from megatron_pipeweaver.runtime.entry import Entry
from megatron_pipeweaver.runtime.offload import HostOffload
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stages import module_stages
from tests.unit.models.examples import cut

IMAGE, IMAGES, SEQUENCE, SAMPLES, VOCABULARY = 500, 3, 64, 3, 128
VISION = ModuleSpec(
    name="vision",
    kind=ModuleKind.VISION,
    layers=4,
    hidden_size=64,
    ffn_hidden_size=256,
    attention_heads=4,
    kv_groups=4,
    output_size=96,
    projector_hidden_size=96,
    patch_size=4,
)
LANGUAGE = ModuleSpec(
    name="language",
    kind=ModuleKind.LANGUAGE,
    layers=4,
    hidden_size=96,
    ffn_hidden_size=256,
    attention_heads=4,
    kv_groups=2,
    after=("vision",),
    gated_mlp=True,
    vocab_size=VOCABULARY,
    layer=LayerOptions(rms_norm=False, bias=True, rotary=True),  # as Megatron's defaults are
)
MODEL = ModelSpec(name="small", modules=(VISION, LANGUAGE))
LAYOUT = cut(2, vision=(2, 2), language=(2, 2))
MIXTURES = ("recompute*1+keep*1", "offload*1+recompute_light*1", "keep*1+recompute_norm*1")
CLOSE = 0.05
"""The share by which a plan may miss."""


def work(chunk: ModelChunk) -> tuple[Load, dict[str, Tensor], list[Tensor]]:
    """What a pass of `chunk` works on: its load, a microbatch, and what comes in."""
    place = chunk.place
    if place.module == "vision":
        units = SEQUENCE
        load = Load(
            sequence=units, batch=IMAGES, lengths=(units,) * IMAGES, output_tokens=units * IMAGES
        )
        inputs = [] if place.is_first else [torch.randn(units, IMAGES, 64)]
        return load, {"images": torch.randn(IMAGES, 3, 32, 32)}, inputs
    load = Load(
        sequence=SEQUENCE,
        batch=SAMPLES,
        lengths=(SEQUENCE,) * SAMPLES,
        output_tokens=SEQUENCE * SAMPLES,
    )
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, SEQUENCE))
    tokens[:, :16] = IMAGE
    microbatch = {
        "tokens": tokens,
        "labels": torch.randint(0, VOCABULARY, tokens.shape),
        "loss_mask": torch.ones(tokens.shape),
    }
    return load, microbatch, [torch.randn(16 if place.is_first else SEQUENCE, SAMPLES, 96)]


def held_bytes(chunk: ModelChunk, strategy: str) -> tuple[int, int]:
    """What a stage pair holds behind its forward, and between a split backward and its ``W``."""
    _, microbatch, inputs = work(chunk)
    entry = Entry(inputs, [True] * len(inputs))
    meter = ActivationMeter(chunk.parameters())
    offload = HostOffload()
    chunk.set_strategy(strategy, offload)
    chunk.set_input_tensor(list(entry.begin(inputs)))
    del inputs
    with chunk.weight_gradients.leaving_out(True) as left, meter.recording():
        output = chunk(microbatch)
    assert not list(offload.back())
    held = meter.held_bytes
    output.backward(torch.ones_like(output))
    assert meter.held_bytes == 0
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in left.tensors()}
    return held, sum(one.nbytes() for one in storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_plans_know_what_stage_pairs_hold(groups: Any, dropout: float) -> None:
    options = ModelOptions(
        max_sequence_length=128, image_size=32, image_token_id=IMAGE, dropout=dropout
    )
    costs = AnalyticCostModel(
        load_device("cpu"),
        RunOptions.unfused(dropout=dropout > 0),
        strategies=tuple(LayerStrategy),
    )
    cuts = {one.module: module_stages(one) for one in LAYOUT.modules}
    chunks = [
        chunk
        for rank in range(2)
        for chunk in build_chunks(MODEL, LAYOUT, options, pg_collection=groups, rank=rank)
    ]
    missed: Mapping[tuple[str, int, str], str] = {}
    for chunk in chunks:
        module, stage = chunk.place.module, chunk.place.stage
        layered = costs.layer_strategies(MODEL.module(module), cuts[module][stage], work(chunk)[0])
        for name in (*LayerStrategy, *MIXTURES):
            planned = layered.strategy(layer_strategies(name, 2)).memory_bytes
            held, left = held_bytes(chunk, name)
            slack = CLOSE * max(held, planned) + 1024  # token ids and the like
            if max(abs(held - planned), left - planned) > slack:
                missed = {**missed, (module, stage, name): f"{planned}, held {held}, then {left}"}
    assert not missed
