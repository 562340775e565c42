"""Stage pairs layer by layer: mixtures add up, and copies hide as a graph of two queues says."""

from itertools import product

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import LayerOptions, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.graph import Device, Graph, OperatorNode, emulate
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stage_costs import GraphCost, StageCosts, StagePart
from megatron_pipeweaver.semu.work import Queue

KEEP, OFFLOAD, RECOMPUTE = LayerStrategy.KEEP, LayerStrategy.OFFLOAD, LayerStrategy.RECOMPUTE
LOAD = Load(sequence=256, batch=2, lengths=(256, 256), output_tokens=512)
MODULE = ModuleSpec(
    name="one",
    kind=ModuleKind.LANGUAGE,
    layers=6,
    hidden_size=256,
    ffn_hidden_size=512,
    attention_heads=4,
    kv_groups=4,
    vocab_size=1000,
    layer=LayerOptions(window=32, full_attention_layers=(1,)),
)
STAGE = StageShape(layers=4, is_first=True, is_last=True)


def _costs(strategies: tuple[LayerStrategy, ...] = tuple(LayerStrategy)) -> AnalyticCostModel:
    return AnalyticCostModel(load_device("H100"), RunOptions(), strategies=strategies)


def test_one_strategy_in_all_layers_is_that_of_the_cost_model() -> None:
    costs = _costs()
    layers = costs.layer_strategies(MODULE, STAGE, LOAD)
    for one, expected in zip(
        LayerStrategy, costs.stage_strategies(MODULE, STAGE, LOAD), strict=True
    ):
        assert layers.strategy((one,) * 4) == expected


def test_mixtures_without_copies_add_up() -> None:
    layers = _costs().layer_strategies(MODULE, STAGE, LOAD)
    assert len(layers.layers) == 4
    keep = layers.strategy((KEEP,) * 4)
    choices = product([KEEP, RECOMPUTE, LayerStrategy.ATTENTION, LayerStrategy.LIGHT], repeat=4)
    for choice in choices:
        mixed = layers.strategy(choice)
        pairs = [
            (layer[KEEP], layer[one]) for layer, one in zip(layers.layers, choice, strict=True)
        ]
        assert mixed.forward_ns == keep.forward_ns
        assert mixed.backward_ns - keep.backward_ns == sum(
            b.backward_ns - a.backward_ns for a, b in pairs
        )
        assert mixed.weight_grad_ns - keep.weight_grad_ns == sum(
            b.weight_grad_ns - a.weight_grad_ns for a, b in pairs
        )
        assert keep.memory_bytes - mixed.memory_bytes == sum(
            a.held_bytes - b.held_bytes for a, b in pairs
        )


def test_mixtures_are_named_by_their_runs() -> None:
    layers = _costs().layer_strategies(MODULE, STAGE, LOAD)
    assert layers.strategy((RECOMPUTE, RECOMPUTE, KEEP, KEEP)).name == "recompute*2+keep*2"


def test_choices_of_other_layers_are_refused() -> None:
    layers = _costs().layer_strategies(MODULE, STAGE, LOAD, (KEEP,))
    with pytest.raises(ConfigError, match="3 choices for 4 layers"):
        layers.strategy((KEEP,) * 3)
    with pytest.raises(ConfigError, match="'offload' was not emulated"):
        layers.strategy((OFFLOAD,) * 4)


def _layer(copy_ns: int) -> dict[LayerStrategy, GraphCost]:
    rest = {
        "weight_grad_ns": 10,
        "exposed_forward_ns": 0,
        "exposed_backward_ns": 0,
        "forward_peak_bytes": 200,
        "backward_peak_bytes": 300,
    }
    keep = GraphCost(forward_ns=20, backward_ns=30, held_bytes=100, host_bytes=0, copy_ns=0, **rest)
    away = GraphCost(
        forward_ns=20, backward_ns=30, held_bytes=0, host_bytes=100, copy_ns=copy_ns, **rest
    )
    return {KEEP: keep, OFFLOAD: away}


def _graph_times(choice: tuple[LayerStrategy, ...], copy_ns: int) -> tuple[int, int]:
    """Forward and backward of layers of 20 and 40 ns as graphs with a queue for copies."""
    compute, link = Device(0, Queue.COMPUTE), Device(0, Queue.HOST_LINK)
    forward: list[OperatorNode] = []
    for one in choice:
        forward.append(OperatorNode("layer", compute, 20))
        if one is OFFLOAD:
            forward.append(OperatorNode("out", link, copy_ns, after=(len(forward) - 1,)))
    backward: list[OperatorNode] = []
    starts: list[int] = []
    for one in reversed(choice):
        # A copy starts with the layer before it: behind all that this layer waits for.
        waits = backward[starts[-1]].after if starts else ()
        behind = (starts[-2],) if len(starts) > 1 else ()
        after: tuple[int, ...] = ()
        if one is OFFLOAD:
            backward.append(OperatorNode("in", link, copy_ns, after=waits + behind))
            after = (len(backward) - 1,)
        starts.append(len(backward))
        backward.append(OperatorNode("layer", compute, 40, after=after))
    return tuple(
        emulate(Graph(operators=tuple(nodes), tensors=())).duration_ns
        for nodes in (forward, backward)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("copy_ns", [1, 15, 20, 39, 40, 70, 200])
def test_copies_hide_behind_compute_where_they_fit(copy_ns: int) -> None:
    parts = (StagePart(copies=5, is_layer=True, costs=_layer(copy_ns)),)
    stage = StageCosts(parts=parts, context_bytes=0, frozen=False)
    for choice in product([KEEP, OFFLOAD], repeat=5):
        found = stage.strategy(choice)
        assert (found.forward_ns, found.backward_ns + found.weight_grad_ns) == _graph_times(
            choice, copy_ns
        )
        assert found.memory_bytes == 100 * choice.count(KEEP)


def test_a_slow_link_bounds_a_stage_that_offloads_everything() -> None:
    parts = (StagePart(copies=5, is_layer=True, costs=_layer(70)),)
    stage = StageCosts(parts=parts, context_bytes=0, frozen=False)
    found = stage.strategy((OFFLOAD,) * 5)
    assert found.forward_ns == 20 + 5 * 70  # the first layer, then copies without a pause
    assert found.backward_ns + found.weight_grad_ns == 5 * 70 + 40


def test_a_fast_link_exposes_the_first_copy_alone() -> None:
    parts = (StagePart(copies=5, is_layer=True, costs=_layer(15)),)
    stage = StageCosts(parts=parts, context_bytes=0, frozen=False)
    found = stage.strategy((OFFLOAD,) * 5)
    assert found.forward_ns == 5 * 20 + 15
    assert found.backward_ns + found.weight_grad_ns == 15 + 5 * 40


def test_a_layer_on_its_way_back_needs_room() -> None:
    costs = _layer(15)
    assert costs[OFFLOAD].working_bytes == 300 + 100
    assert costs[KEEP].working_bytes == 300 - 100
