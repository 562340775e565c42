from dataclasses import replace

import pytest

from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import LayerOptions, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.stages import stage_parts
from megatron_pipeweaver.semu.strategies import recomputed
from megatron_pipeweaver.semu.work import OperatorClass, Phase, Queue, Work

LOAD = Load(sequence=256, batch=2, lengths=(256, 256), output_tokens=128)
MIDDLE = StageShape(layers=3, is_first=False, is_last=False)


def _module(**more: object) -> ModuleSpec:
    fields: dict[str, object] = {
        "name": "one",
        "kind": ModuleKind.VISION,
        "layers": 8,
        "hidden_size": 512,
        "ffn_hidden_size": 2048,
        "attention_heads": 8,
        "kv_groups": 8,
    }
    return ModuleSpec(**{**fields, **more})  # type: ignore[arg-type]


def _costs(**more: object) -> AnalyticCostModel:
    parallel = ParallelSizes(pipeline=1)
    options = {"parallel": parallel, **more}
    return AnalyticCostModel(load_device("H100"), RunOptions(**options))  # type: ignore[arg-type]


def test_recompute_holds_the_layers_inputs_and_pays_their_forward() -> None:
    keep, recompute = _costs().stage_strategies(_module(), MIDDLE, LOAD)
    assert recompute.memory_bytes == 3 * 512 * 512 * 2
    whole = keep.backward_ns + keep.weight_grad_ns
    assert recompute.backward_ns == whole + keep.forward_ns
    assert recompute.weight_grad_ns == 0  # what was dropped is not held for it once more


def test_weight_gradients_that_cannot_run_apart_are_timed_as_gradients() -> None:
    # They were taken for something that runs again, and timed by the factor of forwards.
    profile = replace(load_device("H100"), layer_forward_permille=500, layer_backward_permille=1500)
    costs = AnalyticCostModel(profile, RunOptions(), strategies=tuple(LayerStrategy))
    keep, *others = costs.stage_strategies(_module(), MIDDLE, LOAD)
    for one in others:
        if one.name != LayerStrategy.OFFLOAD:
            whole_ns = one.backward_ns + one.weight_grad_ns
            assert whole_ns >= keep.backward_ns + keep.weight_grad_ns, one.name


def test_only_what_masks_fills_in_scores() -> None:
    options = RunOptions.unfused()

    def softmax_bytes(lengths: tuple[int, ...]) -> int:
        load = Load(sequence=64, batch=1, lengths=lengths)
        graph = transformer_layer(layer_spec(_module()), load, options)
        (one,) = (each for each in graph.operators if each.name == "attention_softmax")
        return one.forward.memory_bytes

    assert softmax_bytes((32, 32)) == 2 * softmax_bytes((64,))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_what_runs_again_does_not_hide_behind_collectives(sequence_parallel: bool) -> None:
    parallel = ParallelSizes(pipeline=1, tensor=4, sequence_parallel=sequence_parallel)
    costs = _costs(parallel=parallel)
    graph = transformer_layer(layer_spec(_module()), LOAD, costs.options)
    keep = costs.graph_cost(graph)
    for strategy in LayerStrategy:
        again = recomputed(strategy, graph).operators
        cost = costs.graph_cost(graph, strategy)
        longer_ns = (cost.backward_ns + cost.weight_grad_ns) - (
            keep.backward_ns + keep.weight_grad_ns
        )
        assert longer_ns >= sum(
            costs.work_ns(one.forward, one.kind, one.queue)
            for one in graph.operators
            if one.name in again and one.queue is Queue.COMPUTE
        )


def test_a_stage_without_layers_holds_nothing() -> None:
    empty = StageShape(layers=0, is_first=False, is_last=False)
    (keep,) = _costs().stage_strategies(_module(), empty, LOAD)
    assert (keep.forward_ns, keep.backward_ns, keep.memory_bytes) == (0, 0, 0)


def test_frozen_modules_have_no_weight_gradient() -> None:
    (trained, _), (frozen, _) = (
        _costs().stage_strategies(_module(frozen=flag), MIDDLE, LOAD) for flag in (False, True)
    )
    assert trained.weight_grad_ns > 0
    assert frozen.weight_grad_ns == 0
    costs = _costs()
    layer = costs.graph_cost(transformer_layer(layer_spec(_module()), LOAD, costs.options))
    assert layer.weight_at_once_ns > 0
    assert frozen.backward_ns == trained.backward_ns - 3 * layer.weight_at_once_ns


def test_first_and_last_stages_do_more() -> None:
    module = _module(patch_size=14, output_size=1024, projector_hidden_size=1024)
    costs = _costs()
    middle = costs.stage_strategies(module, MIDDLE, LOAD)[0]
    ends = [
        StageShape(layers=3, is_first=True, is_last=False),
        StageShape(layers=3, is_first=False, is_last=True),
    ]
    for stage in ends:
        one = costs.stage_strategies(module, stage, LOAD)[0]
        assert one.forward_ns > middle.forward_ns
        assert one.memory_bytes > middle.memory_bytes


def test_packed_documents_attend_to_themselves_alone() -> None:
    whole = Load(sequence=4096, batch=1, lengths=(4096,))
    packed = Load(sequence=4096, batch=1, lengths=(1024,) * 4)
    times = [
        _costs().stage_strategies(_module(), MIDDLE, load)[0].forward_ns for load in (whole, packed)
    ]
    assert times[1] < times[0]
    dense = [
        _costs(attention=Attention.DENSE).stage_strategies(_module(), MIDDLE, load)[0].forward_ns
        for load in (whole, packed)
    ]
    assert dense[0] < dense[1]  # the whole square, and a mask


def test_windowed_layers_cost_less_than_those_with_full_attention() -> None:
    module = _module(layer=LayerOptions(window=64, full_attention_layers=(1,)))
    load = Load(sequence=4096, batch=1, lengths=(4096,))
    one, full = (
        _costs().stage_strategies(
            module, StageShape(layers=1, is_first=False, is_last=False, first_layer=layer), load
        )[0]
        for layer in (0, 1)
    )
    assert one.forward_ns < full.forward_ns


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_communication_hides_behind_weight_gradients(sequence_parallel: bool) -> None:
    parallel = ParallelSizes(pipeline=1, tensor=4, sequence_parallel=sequence_parallel)
    costs = _costs(parallel=parallel)
    graph = transformer_layer(layer_spec(_module()), LOAD, costs.options)
    cost = costs.graph_cost(graph)
    one_after_another = sum(
        costs.latency_ns(graph, phase) for phase in (Phase.INPUT_GRAD, Phase.WEIGHT_GRAD)
    )
    assert cost.backward_ns + cost.weight_grad_ns < one_after_another


def test_one_queue_hides_nothing() -> None:
    costs = _costs()
    graph = transformer_layer(layer_spec(_module()), LOAD, costs.options)
    cost = costs.graph_cost(graph)
    assert cost.forward_ns == costs.latency_ns(graph, Phase.FORWARD)
    at_once_ns = cost.weight_at_once_ns
    assert cost.backward_ns == costs.latency_ns(graph, Phase.INPUT_GRAD) + at_once_ns
    assert cost.weight_grad_ns == costs.latency_ns(graph, Phase.WEIGHT_GRAD) - at_once_ns
    assert 0 < at_once_ns < cost.weight_grad_ns  # norms'
    assert cost.working_bytes > 0


def test_offloaded_layers_leave_the_device_and_hide_their_copies() -> None:
    costs = AnalyticCostModel(
        load_device("H100"),
        RunOptions(),
        strategies=(LayerStrategy.KEEP, LayerStrategy.OFFLOAD),
    )
    keep, offload = costs.stage_strategies(_module(), MIDDLE, LOAD)
    assert offload.memory_bytes == 0 < keep.memory_bytes
    assert offload.forward_ns >= keep.forward_ns
    assert offload.backward_ns > keep.backward_ns


def test_larger_messages_take_longer() -> None:
    costs = _costs()
    assert 0 < costs.p2p_latency_ns(1) < costs.p2p_latency_ns(10**9)


def test_rules_hold_for_messages_and_the_optimizer_as_well() -> None:
    rules = {OperatorClass.SEND: lambda operator, phase: 77}
    costs = AnalyticCostModel(load_device("H100"), RunOptions(), rules=rules)
    assert costs.p2p_latency_ns(1 << 20) == 77
    assert costs.work_ns(Work(memory_bytes=1 << 20), OperatorClass.OPTIMIZER) > 77


def test_the_framework_works_between_the_kernels_of_heads_as_of_layers() -> None:
    plain = load_device("H100")
    slow = replace(plain, kernel_forward_ns=1000, kernel_backward_ns=3000, checkpoint_backward_ns=7)
    strategies = (LayerStrategy.KEEP, LayerStrategy.NORM)
    before, after = (
        AnalyticCostModel(device, RunOptions(), strategies=strategies) for device in (plain, slow)
    )
    stage = StageShape(layers=2, is_first=True, is_last=True)
    module = _module(layers=2, patch_size=14, output_size=64)
    graphs = [part.build(RunOptions()) for part in stage_parts(module, stage, LOAD)]
    copies = [part.copies for part in stage_parts(module, stage, LOAD)]
    kernels = {
        phase: sum(count * one.kernels(phase) for count, one in zip(copies, graphs, strict=True))
        for phase in Phase
    }
    for strategy in strategies:
        one, other = (
            costs.layer_strategies(module, stage, LOAD).uniform(strategy)
            for costs in (before, after)
        )
        assert other.forward_ns - one.forward_ns == 1000 * kernels[Phase.FORWARD]
        again = 0 if strategy is LayerStrategy.KEEP else 2 * 2 * (1000 + 7)  # two norms a layer
        assert (other.backward_ns + other.weight_grad_ns) - (
            one.backward_ns + one.weight_grad_ns
        ) == 3000 * (kernels[Phase.INPUT_GRAD] + kernels[Phase.WEIGHT_GRAD]) + again
