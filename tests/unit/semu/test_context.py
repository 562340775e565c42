"""Context parallelism: a share of the tokens each, keys and values round a ring."""

import pytest

from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.graph import emulate
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.memory import module_parameters, rank_states, stage_parameters
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.presets import module_preset
from megatron_pipeweaver.semu.stages import stage_parts
from megatron_pipeweaver.semu.step import forward_flops
from megatron_pipeweaver.semu.strategies import held_tensors, recomputed
from megatron_pipeweaver.semu.training import forward_graph
from megatron_pipeweaver.semu.work import OperatorClass, Phase, Queue, Subgraph

LANGUAGE = module_preset("llama3-8b")
VISION = module_preset("vit-5b")
LOAD = Load(sequence=8192, batch=1, lengths=(8192,), output_tokens=8192)
WHOLE = StageShape(layers=32, is_first=True, is_last=True)
KV_BYTES = 2 * 8192 * 8 * 128 * 2  # keys and values, 8 groups of 128 channels, bf16
STRATEGIES = (LayerStrategy.KEEP, LayerStrategy.RECOMPUTE, LayerStrategy.ATTENTION)


def options(context: int, tensor: int = 1) -> RunOptions:
    return RunOptions(parallel=ParallelSizes(pipeline=1, context=context, tensor=tensor))


def costs(context: int, tensor: int = 1) -> AnalyticCostModel:
    return AnalyticCostModel(load_device("H800"), options(context, tensor), strategies=STRATEGIES)


def layer(context: int, tensor: int = 1) -> Subgraph:
    return transformer_layer(layer_spec(LANGUAGE), LOAD, options(context, tensor))


def sent(graph: Subgraph, phase: Phase) -> int:
    return sum(
        one.work(phase).network_bytes
        for one in graph.operators
        if one.kind is OperatorClass.RING_EXCHANGE
    )


@pytest.mark.parametrize("context", [1, 2, 4, 8])
@pytest.mark.parametrize("phase", list(Phase))
def test_flops_of_a_rank_are_its_share(context: int, phase: Phase) -> None:
    flops = layer(context).flops(phase)
    assert flops == pytest.approx(layer(1).flops(phase) / context, rel=1e-6)


@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (4, 1), (8, 1), (4, 2)])
def test_keys_and_values_of_all_others_pass_every_rank(context: int, tensor: int) -> None:
    graph = layer(context, tensor)
    share = KV_BYTES // context // tensor
    assert sent(graph, Phase.FORWARD) == (context - 1) * share
    # Back again, with their gradients.
    assert sent(graph, Phase.INPUT_GRAD) == 2 * (context - 1) * share
    assert sent(graph, Phase.WEIGHT_GRAD) == 0


def test_one_rank_sends_nothing_and_has_no_steps() -> None:
    assert not any(one.queue is Queue.CONTEXT_LINK for one in layer(1).operators)
    assert [one.name for one in layer(1).operators if one.kind is OperatorClass.ATTENTION] == [
        "attention"
    ]


def test_blocks_come_in_while_others_are_worked_on() -> None:
    model = costs(4)
    graph = layer(4)
    times = {one.name: model.work_ns(one.forward, one.kind, one.queue) for one in graph.operators}
    ring = [times[f"attention_ring:{step}"] for step in (1, 2, 3)]
    blocks = [times[f"attention:{step}"] for step in range(4)]
    nodes = forward_graph(
        graph,
        lambda one, phase: model.work_ns(one.work(phase), one.kind, one.queue),
        recomputed(LayerStrategy.KEEP, graph),
    )
    timeline = emulate(nodes)
    ends = {one.name: end for one, end in zip(nodes.operators, timeline.ends_ns, strict=True)}
    starts = {one.name: at for one, at in zip(nodes.operators, timeline.starts_ns, strict=True)}
    took = ends["attention:3.forward"] - starts["attention:0.forward"]
    assert max(sum(blocks), sum(ring)) <= took < sum(blocks) + sum(ring)
    assert starts["attention_ring:1.forward"] < ends["attention:0.forward"]


def test_what_is_kept_is_a_share() -> None:
    whole, shared = layer(1), layer(4)
    keep = [
        sum(one.size_bytes for one in held_tensors(one_, recomputed(LayerStrategy.KEEP, one_)))
        for one_ in (whole, shared)
    ]
    assert keep[1] == pytest.approx(keep[0] / 4, rel=1e-3)


@pytest.mark.parametrize("strategy", range(len(STRATEGIES)))
def test_stages_hold_less_and_take_less(strategy: int) -> None:
    middle = StageShape(layers=4, is_first=False, is_last=False)
    one, four = (
        costs(context).stage_strategies(LANGUAGE, middle, LOAD)[strategy] for context in (1, 4)
    )
    assert one.memory_bytes / 4 == pytest.approx(four.memory_bytes, rel=0.01)
    assert one.forward_ns / 4 < four.forward_ns < one.forward_ns
    assert one.backward_ns / 4 < four.backward_ns < one.backward_ns


def test_recomputed_attention_runs_all_its_steps_again() -> None:
    graph = layer(4)
    again = recomputed(LayerStrategy.ATTENTION, graph)
    assert {f"attention:{step}" for step in range(4)} <= again.operators
    assert {f"attention_ring:{step}" for step in (1, 2, 3)} <= again.operators
    model = costs(4)
    keep = model.graph_cost(graph)
    attention = model.graph_cost(graph, LayerStrategy.ATTENTION)
    assert attention.held_bytes < keep.held_bytes
    assert attention.backward_ns > keep.backward_ns


def test_heads_and_embeddings_are_shared_too() -> None:
    flops = [
        sum(
            part.copies * part.build(options(context)).flops(Phase.FORWARD)
            for part in stage_parts(LANGUAGE, WHOLE, LOAD)
        )
        for context in (1, 4)
    ]
    assert flops[1] == pytest.approx(flops[0] / 4, rel=1e-6)
    assert flops[0] == forward_flops(LANGUAGE, LOAD, options(4))


def test_encoders_are_not_split() -> None:
    load = Load(sequence=2704, batch=4, lengths=(2704,) * 4, output_tokens=4 * 169)
    stage = StageShape(layers=8, is_first=True, is_last=False)
    assert costs(1).stage_strategies(VISION, stage, load) == costs(4).stage_strategies(
        VISION, stage, load
    )


def test_parameters_are_whole_on_every_rank_and_optimizer_states_a_share() -> None:
    assert stage_parameters(LANGUAGE, WHOLE, options(4)) == module_parameters(LANGUAGE)
    model = ModelSpec(name="text", modules=(LANGUAGE,))
    one, four = (rank_states(model, make_layout(model, 1, {}), options(size))[0] for size in (1, 4))
    assert four.weight_bytes == one.weight_bytes
    assert four.gradient_bytes == one.gradient_bytes
    assert four.optimizer_bytes == one.optimizer_bytes // 4


def test_dense_attention_gathers_keys_and_values_and_keeps_them_whole() -> None:
    dense = {
        context: RunOptions(
            attention=Attention.DENSE, parallel=ParallelSizes(pipeline=1, context=context)
        )
        for context in (1, 4)
    }
    one, four = (transformer_layer(layer_spec(LANGUAGE), LOAD, dense[size]) for size in (1, 4))
    assert not any(each.queue is Queue.CONTEXT_LINK for each in one.operators)
    links = [each for each in four.operators if each.queue is Queue.CONTEXT_LINK]
    assert [each.name for each in links] == ["gather_key", "gather_value"]
    for phase in (Phase.FORWARD, Phase.INPUT_GRAD):
        assert sum(each.work(phase).network_bytes for each in links) == KV_BYTES * 3 // 4
    for phase in Phase:
        assert four.flops(phase) == pytest.approx(one.flops(phase) / 4, rel=1e-6)
    sizes = [{each.name: each.size_bytes for each in graph.tensors} for graph in (one, four)]
    assert sizes[1]["attention.probabilities"] == sizes[0]["attention.probabilities"] // 4
    assert sizes[1]["repeat_key.out"] == sizes[0]["repeat_key.out"]
