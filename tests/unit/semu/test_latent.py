"""Latent attention among ranks, fused, and run again."""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import LatentOptions, LayerOptions, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import LayerSpec, layer_spec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.strategies import held_tensors, recomputed, weight_grads_apart
from megatron_pipeweaver.semu.training import backward_graph
from megatron_pipeweaver.semu.work import OperatorClass, Phase, Queue, Subgraph

LATENT = LatentOptions(kv_rank=32, query_rank=48, head_size=16, rotary_size=8, value_size=20)
MODULE = ModuleSpec(
    name="language",
    kind=ModuleKind.LANGUAGE,
    layers=2,
    hidden_size=128,
    ffn_hidden_size=256,
    attention_heads=8,
    kv_groups=8,
    gated_mlp=True,
    layer=LayerOptions(latent=LATENT, qk_norm=True),
)
ROWS = 64
LOAD = Load(sequence=ROWS, batch=1, lengths=(ROWS,))
DOWN = (128 + 1) * 48 + 128 * (32 + 8) + 32
"""Parameters of down projections and norms of latents."""
UP = 48 * 8 * (16 + 8) + 32 * 8 * (16 + 20) + 8 * 20 * 128


def layer(options: RunOptions, spec: LayerSpec | None = None) -> Subgraph:
    return transformer_layer(spec or layer_spec(MODULE), LOAD, options)


def among(options: RunOptions, tensor: int, *, sequence: bool = True) -> RunOptions:
    parallel = ParallelSizes(pipeline=1, tensor=tensor, sequence_parallel=sequence and tensor > 1)
    return replace(options, parallel=parallel)


def attention_parameters(graph: Subgraph) -> int:
    names = ("query_", "kv_", "proj.")
    return sum(
        one.elements for one in graph.tensors if one.parameter and one.name.startswith(names)
    )


def test_megatrons_own_layers_divide_down_projections_and_transformer_engines_do_not() -> None:
    norms = 48 + 32
    own, engine = (layer(among(one, 4)) for one in (RunOptions.unfused(), RunOptions()))
    assert attention_parameters(own) == norms + (DOWN - norms + UP) // 4
    assert attention_parameters(engine) == DOWN + UP // 4
    for options in (RunOptions.unfused(), RunOptions()):
        assert attention_parameters(layer(options)) == DOWN + UP


@pytest.mark.parametrize("options", [RunOptions(), RunOptions.unfused()], ids=["fused", "own"])
def test_ranks_share_the_work(options: RunOptions) -> None:
    # Whole down projections work on a share of the rows.
    alone, shared = (layer(among(options, size)) for size in (1, 4))
    for phase in Phase:
        assert shared.flops(phase) == alone.flops(phase) // 4
    links = Counter(one.kind for one in shared.operators if one.queue is Queue.TENSOR_LINK)
    assert links[OperatorClass.REDUCE_SCATTER] == 2  # behind attention and MLP
    assert not [one for one in alone.operators if one.queue is Queue.TENSOR_LINK]


def test_gradients_of_keys_positions_are_summed_over_ranks() -> None:
    shared = layer(among(RunOptions.unfused(), 2))
    (one,) = (one for one in shared.operators if one.name == "share_positions")
    assert one.input_grad.network_bytes == 2 * ROWS * 8 * 4 // 2
    assert one.forward.network_bytes == 0


def test_fused_attention_counts_keys_and_values_by_their_width() -> None:
    (one,) = (one for one in layer(RunOptions()).operators if one.name == "attention")
    pairs = ROWS * (ROWS + 1) // 2
    assert one.forward.flops == 2 * 8 * pairs * (24 + 20)
    assert one.input_grad.flops == 2 * 8 * pairs * (3 * 24 + 2 * 20)


@pytest.mark.parametrize("options", [RunOptions(), RunOptions.unfused()], ids=["fused", "own"])
def test_up_projections_run_again_once_and_before_attention_needs_them(options: RunOptions) -> None:
    graph = layer(options)
    again = recomputed(LayerStrategy.UP_PROJECTION, graph)
    nodes = backward_graph(graph, lambda one, phase: one.work(phase).flops, again)
    names = [one.name for one in nodes.operators]
    forwards = Counter(name for name in names if name.endswith(".forward"))
    assert set(forwards) == {f"{name}.forward" for name in again.operators}
    assert set(forwards.values()) == {1}
    attention = [name for name in names if name.startswith("attention")]
    assert max(map(names.index, forwards)) < names.index(attention[0])
    held = {one.name for one in held_tensors(graph, again)}
    assert "positions" not in held  # a view: what it looks into stays
    assert {"kv_down.out", "query_down.out"} <= held
    assert not held & {"query_up.out", "kv_up.out", "join_key.out", "key", "value"}


def test_weight_gradients_apart_are_those_of_operands_that_stay() -> None:
    graph = layer(RunOptions.unfused())
    mlp = {"fc1", "fc2"}
    ups, downs = {"query_up", "kv_up"}, {"query_down", "kv_down"}
    for strategy, linears in {
        LayerStrategy.KEEP: ups | downs | {"proj"} | mlp,
        LayerStrategy.UP_PROJECTION: downs | {"proj"} | mlp,
        LayerStrategy.NORM: {"fc2"},
    }.items():
        assert weight_grads_apart(strategy, graph) == linears, strategy


def test_without_latent_attention_nothing_is_projected_again() -> None:
    plain = layer(RunOptions(), layer_spec(replace(MODULE, layer=LayerOptions())))
    again = recomputed(LayerStrategy.UP_PROJECTION, plain)
    assert not again.operators
    assert held_tensors(plain, again) == plain.saved()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_rank": 0}, "latent attention: kv_rank is 0"),
        ({"rotary_size": 7}, "rotary_size is 7; rotary positions turn pairs"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(LATENT, **changes)


def test_heads_have_no_size_and_no_groups_beside_the_latents() -> None:
    with pytest.raises(ConfigError, match="head_size 32 with latent attention"):
        replace(MODULE.layer, head_size=32)
    with pytest.raises(ConfigError, match="kv_groups is 2; latent attention has keys and values"):
        replace(MODULE, kv_groups=2)
