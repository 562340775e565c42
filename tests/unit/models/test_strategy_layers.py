"""One layer of every kind under every strategy: what it keeps, and what it makes of it."""

import math
from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.models.strategy import StrategyLayer, check_strategies
from megatron_pipeweaver.models.weight_grad import WeightGradients
from megatron_pipeweaver.runtime.activations import ActivationMeter
from megatron_pipeweaver.runtime.offload import HostOffload
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.strategies import held_tensors, recomputed
from tests.unit.semu import megatron_layers
from tests.unit.semu.test_against_megatron import SPECS

KINDS = [
    "gpt",
    "llama, grouped",
    "qwen3",
    "experts, llama",
    "experts, shared",
    "latent, experts",
    "latent queries, normed",
    "vit",
]
SEQUENCE, BATCH, DROPOUT = 64, 2, 0.1
Trained = tuple[dict[str, Tensor], int]


@pytest.fixture(autouse=True)
def _one_process(one_process: None) -> Iterator[None]:
    with megatron_layers.experts_without_transformer_engine():
        yield


def build(name: str) -> StrategyLayer:
    torch.manual_seed(3)
    layer = megatron_layers.make_layer(SPECS[name], dropout=DROPOUT, module=StrategyLayer)
    assert isinstance(layer, StrategyLayer)
    return layer


def train(
    name: str,
    layer: StrategyLayer,
    strategy: LayerStrategy,
    gradients: WeightGradients | None = None,
) -> Trained:
    """Output and all gradients; bytes that were kept from the forward to the backward."""
    check_strategies([strategy], [layer])
    torch.manual_seed(4)
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    layer.zero_grad()
    layer.strategy, layer.saver = strategy, HostOffload()
    hidden = torch.randn(SEQUENCE, BATCH, layer.config.hidden_size).requires_grad_(True)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    angles = torch.randn(SEQUENCE, 1, 1, layer.config.kv_channels) if SPECS[name].rotary else None
    meter = ActivationMeter([*layer.parameters(), mask])
    split = gradients is not None
    with meter.recording(), (gradients or WeightGradients(layer)).leaving_out(split) as left:
        output, _ = layer(hidden, attention_mask=mask, rotary_pos_emb=angles)
    held = meter.held_bytes
    layer._choose(LayerStrategy.LIGHT)  # what a forward ran under is in its graph
    output.square().sum().backward()
    left.finish()
    assert meter.held_bytes == 0
    found = {name: one.grad for name, one in layer.named_parameters() if one.grad is not None}
    assert len(found) == len(list(layer.parameters()))
    return {"output": output.detach(), "hidden": hidden.grad, **found}, held


def planned(name: str, strategy: LayerStrategy) -> int:
    load = Load(sequence=SEQUENCE, batch=BATCH, lengths=(SEQUENCE,) * BATCH)
    graph = transformer_layer(SPECS[name], load, RunOptions.unfused(dropout=True))
    return sum(one.size_bytes for one in held_tensors(graph, recomputed(strategy, graph)))


@pytest.mark.parametrize("name", KINDS)
def test_every_strategy_is_the_same_to_the_last_bit_and_keeps_what_was_planned(name: str) -> None:
    layer = build(name)
    kept, most = train(name, layer, LayerStrategy.KEEP)
    for strategy in LayerStrategy:
        found, held = train(name, layer, strategy)
        assert found.keys() == kept.keys()
        for which, one in kept.items():
            assert torch.equal(found[which], one), (strategy, which)
        if strategy is LayerStrategy.OFFLOAD:
            assert held < most / 10
        else:
            assert math.isclose(held, planned(name, strategy), rel_tol=0.03), strategy


@pytest.mark.parametrize("name", ["llama, grouped", "experts, shared", "latent", "vit"])
def test_weight_gradients_are_left_out_only_of_what_stays(name: str) -> None:
    layer = build(name)
    kept, _ = train(name, layer, LayerStrategy.KEEP)
    layer.weight_gradients = WeightGradients(layer)
    for strategy in LayerStrategy:
        found, _ = train(name, layer, strategy, layer.weight_gradients)
        for which, one in kept.items():
            assert torch.equal(found[which], one), (strategy, which)


def test_shared_experts_beside_the_dispatch_are_not_run_again() -> None:
    layer = build("experts, shared")
    layer.mlp.shared_expert_overlap = True
    with pytest.raises(ConfigError, match="drop --moe-shared-expert-overlap"):
        check_strategies([LayerStrategy.SHARED_EXPERTS], [layer])
