"""What a backward holds for a while beside what the forward kept, tensor by tensor."""

from dataclasses import replace

from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.heads import token_embedding, vocabulary_head
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.operators import Sketch, linear
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stage_costs import GraphCost
from megatron_pipeweaver.semu.work import Phase, Queue, Subgraph

ROWS, WIDTH = 16, 64
LOAD = Load(sequence=ROWS, batch=1, lengths=(ROWS,), output_tokens=ROWS)
MODULE = ModuleSpec(
    name="language",
    kind=ModuleKind.LANGUAGE,
    layers=3,
    hidden_size=WIDTH,
    ffn_hidden_size=4 * WIDTH,
    attention_heads=4,
    kv_groups=4,
    vocab_size=256,
)
FUSED = RunOptions()
APART = replace(FUSED, fused_linear=False)


def _cost(
    graph: Subgraph, options: RunOptions, strategy: LayerStrategy = LayerStrategy.KEEP
) -> GraphCost:
    return AnalyticCostModel(load_device("H100"), options).graph_cost(graph, strategy)


def _linear(options: RunOptions) -> Subgraph:
    sketch = Sketch("one", options)
    source = sketch.tensor("x", ROWS * WIDTH)
    linear(sketch, "l", source, rows=ROWS, width_in=WIDTH, width_out=WIDTH, bias=True)
    return sketch.finish()


def test_weight_gradients_stand_beside_their_buffers_where_linears_are_not_fused() -> None:
    fused, apart = (_cost(_linear(one), one) for one in (FUSED, APART))
    assert apart.held_bytes == fused.held_bytes
    weight_bytes = WIDTH * WIDTH * FUSED.element_bytes
    assert apart.backward_peak_bytes == fused.backward_peak_bytes + weight_bytes


def test_biases_are_added_by_operators_of_their_own_where_linears_are_not_fused() -> None:
    fused, apart = _linear(FUSED), _linear(APART)
    assert [one.name for one in fused.operators] == ["l"]
    assert [one.name for one in apart.operators] == ["l", "l:bias"]
    assert apart.parameters == fused.parameters
    assert apart.flops(Phase.FORWARD) == fused.flops(Phase.FORWARD)


def test_the_gradient_of_a_residual_sum_is_that_of_both_of_its_sides() -> None:
    graph = transformer_layer(layer_spec(MODULE), LOAD, FUSED)
    hidden_bytes = ROWS * WIDTH * FUSED.element_bytes
    cost = _cost(graph, FUSED)
    # At its largest: what is kept, the gradient that came in, and that of the wide activation.
    assert cost.backward_peak_bytes == cost.held_bytes + hidden_bytes + 4 * hidden_bytes


def test_what_is_made_again_is_held_twice_until_its_own_backward() -> None:
    graph = transformer_layer(layer_spec(MODULE), LOAD, FUSED)
    keep, again = _cost(graph, FUSED), _cost(graph, FUSED, LayerStrategy.ACTIVATION)
    # What was dropped is there once more, and the copy that others look for.
    assert again.held_bytes < keep.held_bytes
    assert again.backward_peak_bytes == keep.backward_peak_bytes + 4 * ROWS * WIDTH * 2


def test_a_head_holds_no_gradient_as_large_as_its_logits_from_outside() -> None:
    cost = _cost(vocabulary_head(MODULE, LOAD, FUSED), FUSED)
    softmax_bytes, logit_bytes = 4 * ROWS * 256, 2 * ROWS * 256
    assert cost.backward_peak_bytes < cost.held_bytes + logit_bytes + softmax_bytes


def test_single_precision_losses_are_made_where_the_logits_stand() -> None:
    single = replace(FUSED, element_bytes=4)
    cost = _cost(vocabulary_head(MODULE, LOAD, single), single)
    logit_bytes = 4 * ROWS * 256
    assert cost.forward_peak_bytes < 2 * logit_bytes
    assert cost.backward_peak_bytes < 2 * logit_bytes


def test_an_embedding_has_a_gradient_of_the_whole_table() -> None:
    cost = _cost(token_embedding(MODULE, LOAD, FUSED), FUSED)
    assert cost.backward_peak_bytes >= 256 * WIDTH * FUSED.element_bytes


def test_the_losses_of_tensor_parallel_ranks_are_put_together() -> None:
    options = replace(FUSED, parallel=ParallelSizes(pipeline=1, tensor=2))
    alone, shared = (vocabulary_head(MODULE, LOAD, one) for one in (FUSED, options))
    sent = [one for one in shared.operators if one.name == "loss_totals"]
    assert [one.queue for one in sent] == [Queue.TENSOR_LINK]
    assert sent[0].forward.steps == 3 * 2
    assert all(one.name != "loss_totals" for one in alone.operators)


def test_what_stands_behind_layers_does_not_count_while_they_work() -> None:
    costs = AnalyticCostModel(load_device("H100"), FUSED, strategies=(LayerStrategy.KEEP,))
    middle, last = (StageShape(layers=3, is_first=False, is_last=one) for one in (False, True))
    held, behind = (
        costs.stage_strategies(MODULE, stage, LOAD)[0].memory_bytes for stage in (middle, last)
    )
    head = costs.graph_cost(vocabulary_head(MODULE, LOAD, FUSED))
    most = held + costs.working_bytes(MODULE, middle, LOAD) + 4 * ROWS  # the losses' gradients
    assert behind + costs.working_bytes(MODULE, last, LOAD) == max(
        most, behind + head.working_bytes
    )
