"""Candidates of stage pairs: against all choices of strategies for all layers."""

import random
from collections.abc import Sequence
from itertools import product

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import LayerOptions, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies
from megatron_pipeweaver.partition.candidates import (
    PerLayerCosts,
    duration_ns,
    spread,
    stage_candidates,
)
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stage_costs import GraphCost, StageCosts, StagePart

KEEP, OFFLOAD, RECOMPUTE = LayerStrategy.KEEP, LayerStrategy.OFFLOAD, LayerStrategy.RECOMPUTE
WITHOUT_COPIES = tuple(one for one in LayerStrategy if one is not OFFLOAD)
LOAD = Load(sequence=512, batch=1, lengths=(512,), output_tokens=512)
MODULE = ModuleSpec(
    name="language",
    kind=ModuleKind.LANGUAGE,
    layers=8,
    hidden_size=512,
    ffn_hidden_size=2048,
    attention_heads=8,
    kv_groups=8,
    vocab_size=1000,
    layer=LayerOptions(window=64, full_attention_layers=(1, 2)),
)
STAGE = StageShape(layers=4, is_first=True, is_last=True)


def _cost(time_ns: int, held_bytes: int, copy_ns: int = 0) -> GraphCost:
    return GraphCost(
        forward_ns=100,
        backward_ns=time_ns,
        weight_grad_ns=50,
        held_bytes=held_bytes,
        host_bytes=int(copy_ns > 0),
        copy_ns=copy_ns,
        exposed_forward_ns=0,
        exposed_backward_ns=0,
        forward_peak_bytes=held_bytes,
        backward_peak_bytes=held_bytes,
    )


def _random_costs(seed: int, strategies: Sequence[LayerStrategy]) -> StageCosts:
    """Some runs of equal layers, five layers in all at most, between an embedding and a head."""
    random_ = random.Random(seed)
    other = StagePart(copies=1, is_layer=False, costs={KEEP: _cost(7, 3)})
    runs = [
        StagePart(
            copies=copies,
            is_layer=True,
            costs={
                one: _cost(random_.randint(0, 30), 0, random_.randint(1, 300))
                if one is OFFLOAD
                else _cost(random_.randint(0, 30), random_.randint(0, 30))
                for one in strategies
            },
        )
        for copies in random_.choice([(1,), (3,), (5,), (2, 3), (1, 1, 2)])
    ]
    return StageCosts(
        parts=(other, *runs, other),
        context_bytes=2,
        frozen=random_.random() < 0.2,
    )


def _all(costs: StageCosts) -> list[Strategy]:
    names = [tuple(layer) for layer in costs.layers]
    return [costs.strategy(choice) for choice in product(*names)]


def _values(strategies: Sequence[Strategy]) -> list[tuple[int, int]]:
    return [(duration_ns(one), one.memory_bytes) for one in strategies]


@pytest.mark.parametrize("seed", range(40))
def test_candidates_are_those_of_all_choices(seed):
    costs = _random_costs(seed, random.Random(seed).sample(WITHOUT_COPIES, 1 + seed % 4))
    for most in (2, 4, 10):
        assert _values(stage_candidates(costs, most)) == _values(spread(_all(costs), most))


@pytest.mark.parametrize("seed", range(20))
def test_with_copies_the_leanest_is_that_of_all_choices_and_none_is_slower_than_uniform(seed):
    costs = _random_costs(seed, (KEEP, RECOMPUTE, OFFLOAD))
    found = stage_candidates(costs, 10)
    everything = _all(costs)
    assert found[-1].memory_bytes == min(one.memory_bytes for one in everything)
    assert duration_ns(found[0]) <= min(
        duration_ns(costs.uniform(one)) for one in (KEEP, RECOMPUTE, OFFLOAD)
    )
    by_name = {one.name: one for one in everything}
    assert all(by_name[one.name] == one for one in found)


def test_the_fastest_of_every_range_of_memory_stays():
    def made(time_ns: int, memory_bytes: int) -> Strategy:
        return Strategy(
            name=f"{memory_bytes}",
            forward_ns=0,
            backward_ns=time_ns,
            weight_grad_ns=0,
            memory_bytes=memory_bytes,
        )

    # Ranges of memory with S = 4: 0 to 50, 51 to 101; 60 is slower and larger than 55.
    front = [made(100, 0), made(90, 20), made(80, 49), made(70, 55), made(65, 80), made(10, 101)]
    assert [one.name for one in spread([*front, made(75, 60)], 4)] == ["101", "49", "0"]
    assert [one.name for one in spread(front[:4], 4)] == ["55", "49", "20", "0"]
    assert [one.name for one in spread(front, 2)] == ["101", "0"]


def test_candidates_of_a_real_stage():
    analytic = AnalyticCostModel(load_device("H100"), RunOptions())
    costs = PerLayerCosts(analytic, (KEEP, RECOMPUTE), 10)
    found = costs.stage_strategies(MODULE, STAGE, LOAD)
    keep, recompute = analytic.stage_strategies(MODULE, STAGE, LOAD)
    assert (found[0], found[-1]) == (keep, recompute)
    assert 2 < len(found) <= 10
    assert all(len(layer_strategies(one.name, 4)) == 4 for one in found)
    everything = _all(analytic.layer_strategies(MODULE, STAGE, LOAD, (KEEP, RECOMPUTE)))
    assert _values(found) == _values(spread(everything, 10))
    assert costs.stage_strategies(MODULE, STAGE, LOAD) is found


def test_a_stage_without_layers_has_one_candidate():
    empty = StageShape(layers=0, is_first=True, is_last=False)
    costs = PerLayerCosts(AnalyticCostModel(load_device("H100"), RunOptions()), (KEEP, OFFLOAD))
    assert [one.name for one in costs.stage_strategies(MODULE, empty, LOAD)] == ["keep"]


def test_layers_that_go_to_the_host_come_first():
    analytic = AnalyticCostModel(load_device("H100"), RunOptions())
    found = PerLayerCosts(analytic, (KEEP, RECOMPUTE, OFFLOAD)).stage_strategies(
        MODULE, STAGE, LOAD
    )
    for one in found:
        layers = layer_strategies(one.name, 4)
        offloaded = layers.count(OFFLOAD)
        assert layers[:offloaded] == (OFFLOAD,) * offloaded
    assert any(OFFLOAD in layer_strategies(one.name, 4) for one in found)


@pytest.mark.parametrize(("strategies", "most"), [((KEEP,), 1), ((), 10)])
def test_room_for_the_fastest_and_the_leanest_is_needed(strategies, most):
    with pytest.raises(ConfigError, match="need room for two"):
        PerLayerCosts(AnalyticCostModel(load_device("H100"), RunOptions()), strategies, most)
