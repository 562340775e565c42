"""Whole iterations of real layers: every rank's peak, tensor by tensor, against its plan's."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.plan import ComputeAction, Plan, peak_memory_bytes
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import initialize_by_name
from megatron_pipeweaver.partition.candidates import PerLayerCosts
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.runtime.activations import TensorGauge
from megatron_pipeweaver.runtime.stage import split_backwards
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from tests.distributed.training import Case
from tests.unit.models.test_memory import CLOSE, IMAGE, LAYOUT, MODEL, VOCABULARY
from tests.unit.plugin.test_stages import Ranks, run_all

PATCHES, TEXT = 64, 32
CASE = Case(
    spec=MODEL,
    layout=LAYOUT,
    options=ModelOptions(
        max_sequence_length=256,
        image_size=32,
        image_token_id=IMAGE,
        initialize=partial(initialize_by_name, seed=3),
    ),
)


def microbatch(images: int, seed: int) -> dict[str, torch.Tensor]:
    """One sample: text, and every image's patches as tokens."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (1, images * PATCHES + TEXT), generator=rng)
    tokens[:, : images * PATCHES] = IMAGE
    return {
        "tokens": tokens,
        "labels": torch.randint(0, VOCABULARY, tokens.shape, generator=rng),
        "loss_mask": torch.ones(tokens.shape),
        "images": torch.randn(images, 3, 32, 32, generator=rng),
    }


def planned(
    images: tuple[int, ...],
    capacity_bytes: int,
    split: bool,
    strategies: tuple[LayerStrategy, ...],
) -> Plan:
    item = Item(units=PATCHES, tokens=PATCHES)
    batch = BatchMetadata(
        microbatches=tuple(
            MicrobatchMetadata(
                sequence_length=count * PATCHES + TEXT,
                items={"vision": (item,) * count} if count else {},
            )
            for count in images
        )
    )
    costs = AnalyticCostModel(load_device("cpu"), RunOptions.unfused())
    planner = Planner(
        model=MODEL,
        layout=LAYOUT,
        costs=PerLayerCosts(costs, strategies),
        sub_microbatch={"vision": 2},
        memory_capacity_bytes=(capacity_bytes,) * 2,
        dtypes={"vision": "float32", "language": "float32"},
        search=SearchConfig(
            time_budget_ns=50_000_000, max_rounds=10, split_weight_grad=split, seed=1
        ),
    )
    return planner.plan(batch).plan.plan


STRATEGIES = {
    "keep": (LayerStrategy.KEEP,),
    "without copies": tuple(one for one in LayerStrategy if one is not LayerStrategy.OFFLOAD),
    "all": tuple(LayerStrategy),
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_peaks_of_an_iteration_are_as_planned(groups, name, split):
    rng = random.Random(9)
    images = tuple(rng.choice([0, 1, 1, 2, 3]) for _ in range(5))
    microbatches = [microbatch(count, seed) for seed, count in enumerate(images)]
    loose = planned(images, 1 << 40, split, STRATEGIES[name])
    tight = planned(images, max(peak_memory_bytes(loose)) * 2 // 3, split, STRATEGIES[name])
    for plan in (loose, tight):
        ranks = Ranks(
            CASE,
            groups,
            microbatches,
            plan,
            gauge=lambda chunks: TensorGauge(one for chunk in chunks for one in chunk.parameters()),
        )
        run_all(plan, ranks.stages)
        for gauge, peak in zip(ranks.gauges, peak_memory_bytes(plan), strict=True):
            assert gauge.peak_bytes <= peak * (1 + CLOSE)
            # Between a split backward and its W less is held than is planned for.
            assert gauge.peak_bytes >= peak * (1 - CLOSE) * (0.6 if split_backwards(plan) else 1)
    used = {one.strategy for rank in tight.ranks for one in rank if isinstance(one, ComputeAction)}
    assert (len(used) > 1) == (name != "keep")
