"""SEMU's layers against megatron-core's own: FLOPs, kept bytes, parameters, by strategy."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import pytest

from megatron_pipeweaver.ir.lmm import ExpertOptions, LatentOptions, ModuleKind
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import LayerSpec, layer_spec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.strategies import held_tensors, recomputed
from megatron_pipeweaver.semu.work import Phase, Subgraph

megatron_layers = pytest.importorskip("tests.unit.semu.megatron_layers")
chunks = pytest.importorskip("benchmarks.semu_accuracy.chunks")

LLAMA = {"gated_mlp": True, "rms_norm": True, "bias": False, "qkv_bias": False, "rotary": True}


def _spec(groups: int = 8, **more: object) -> LayerSpec:
    sizes = {
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "heads": 8,
        "kv_groups": groups,
        "head_size": 16,
        "causal": True,
    }
    return LayerSpec(**{**sizes, **more})  # type: ignore[arg-type]


def _latent(**more: object) -> LayerSpec:
    """Heads' queries and keys are 24 wide, values 20: no two sizes are the same."""
    sizes = {"kv_rank": 40, "head_size": 16, "rotary_size": 8, "value_size": 20}
    latent = LatentOptions(**{**sizes, "query_rank": more.pop("query_rank", None)})  # type: ignore[arg-type]
    return _spec(head_size=24, latent=latent, **{**LLAMA, "rotary": False, **more})


EXPERTS = ExpertOptions(count=4, active=2, ffn_hidden_size=64)
SPECS = {
    "gpt": _spec(),
    "gpt, rotary": _spec(rotary=True),
    "gpt, grouped": _spec(groups=2),
    "gpt, window": _spec(window=17),
    "llama": _spec(**LLAMA),
    "llama, grouped": _spec(groups=2, **LLAMA),
    "qwen2": _spec(groups=2, **{**LLAMA, "qkv_bias": True}),
    "qwen3": _spec(groups=2, head_size=32, qk_norm=True, **LLAMA),
    "qwen3, ungrouped": _spec(qk_norm=True, **LLAMA),
    "experts": _spec(bias=False, experts=EXPERTS),
    "experts, llama": _spec(groups=2, experts=EXPERTS, **LLAMA),
    "experts, shared": _spec(experts=replace(EXPERTS, shared_ffn_hidden_size=96), **LLAMA),
    "latent": _latent(),
    "latent, normed": _latent(qk_norm=True),
    "latent queries": _latent(query_rank=56),
    "latent queries, normed": _latent(query_rank=56, qk_norm=True),
    "latent, biases": _latent(query_rank=56, bias=True, rms_norm=False, qk_norm=True),
    "latent, experts": _latent(qk_norm=True, experts=replace(EXPERTS, shared_ffn_hidden_size=96)),
    "vit": _spec(causal=False),
    "vit, no bias": _spec(causal=False, bias=False, qkv_bias=False),
    "vit, gated": _spec(causal=False, gated_mlp=True),
}
SIZES = [(64, 2), (33, 1), (128, 3)]


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    with megatron_layers.one_rank():
        yield


def _graph(spec: LayerSpec, sequence: int, batch: int, *, dropout: bool = False) -> Subgraph:
    load = Load(sequence=sequence, batch=batch, lengths=(sequence,) * batch)
    return transformer_layer(spec, load, RunOptions.unfused(dropout=dropout))


def _held(graph: Subgraph, strategy: LayerStrategy) -> int:
    return sum(one.size_bytes for one in held_tensors(graph, recomputed(strategy, graph)))


def _backward_flops(graph: Subgraph, strategy: LayerStrategy) -> int:
    """Of both gradients, and of what runs again."""
    again = recomputed(strategy, graph).operators
    return (
        graph.flops(Phase.INPUT_GRAD)
        + graph.flops(Phase.WEIGHT_GRAD)
        + sum(one.forward.flops for one in graph.operators if one.name in again)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_layer(name: str, size: tuple[int, int]) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec)
    real = megatron_layers.measure(layer, *size, rotary=spec.rotary)
    graph = _graph(spec, *size)
    backward = graph.flops(Phase.INPUT_GRAD) + graph.flops(Phase.WEIGHT_GRAD)
    assert graph.parameters == real.parameters
    assert graph.flops(Phase.FORWARD) == pytest.approx(real.forward_flops, rel=0.005)
    assert backward == pytest.approx(real.backward_flops, rel=0.005)
    assert _held(graph, LayerStrategy.KEEP) == pytest.approx(real.saved_bytes, rel=0.03)


@pytest.mark.parametrize("name", ["gpt", "llama, grouped", "latent queries, normed", "vit"])
def test_layer_with_dropout(name: str) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec, dropout=0.1)
    real = megatron_layers.measure(layer, 64, 2, rotary=spec.rotary)
    graph = _graph(spec, 64, 2, dropout=True)
    assert _held(graph, LayerStrategy.KEEP) == pytest.approx(real.saved_bytes, rel=0.03)


RECOMPUTED = {
    "core_attn": (
        LayerStrategy.ATTENTION,
        ["gpt", "llama, grouped", "experts, llama", "experts, shared", "latent", "vit"],
    ),
    # Of layers with biases, megatron-core's own recomputation of MLPs never ends.
    "mlp": (LayerStrategy.MLP, ["llama, grouped", "qwen3", "latent queries", "vit, no bias"]),
    "moe": (LayerStrategy.MLP, ["experts", "experts, llama", "experts, shared"]),
    "shared_experts": (LayerStrategy.SHARED_EXPERTS, ["experts, shared"]),
    "mla_up_proj": (
        LayerStrategy.UP_PROJECTION,
        ["latent", "latent, normed", "latent queries", "latent queries, normed", "latent, experts"],
    ),
}
"""Kinds of selective recomputation, and layers that megatron-core itself can run under them."""


@pytest.mark.parametrize(
    ("module", "strategy", "name"),
    [(module, one, name) for module, (one, names) in RECOMPUTED.items() for name in names],
)
def test_selective_recompute(module: str, strategy: LayerStrategy, name: str) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec, recompute=[module])
    real = megatron_layers.measure(layer, 64, 2, rotary=spec.rotary)
    graph = _graph(spec, 64, 2)
    assert _held(graph, strategy) == pytest.approx(real.saved_bytes, rel=0.03)
    assert _held(graph, strategy) < _held(graph, LayerStrategy.KEEP)
    assert _backward_flops(graph, strategy) == pytest.approx(real.backward_flops, rel=0.005)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="is installed")
@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("layernorm", "FP8GlobalStateManager"),
        ("moe_act", "moe_grouped_gemm"),
    ],
)
def test_what_megatron_cannot_run_again_without_transformer_engine(module: str, why: str) -> None:
    def run(spec: LayerSpec) -> None:
        layer = megatron_layers.make_layer(spec, recompute=[module])
        megatron_layers.measure(layer, 8, 1, rotary=spec.rotary)

    with pytest.raises((NameError, ValueError), match=why):
        run(SPECS["experts, llama"])


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="is installed")
def test_megatron_cannot_build_latent_attention_without_transformer_engine() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'k_channels'"):
        megatron_layers.make_layer(SPECS["latent"], as_megatron_has_it=True)


@pytest.mark.parametrize(
    "name", ["gpt", "llama, grouped", "qwen3", "experts, shared", "latent queries, normed", "vit"]
)
def test_full_recompute(name: str) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec)
    real = megatron_layers.measure(layer, 64, 2, rotary=spec.rotary, recompute=True)
    graph = _graph(spec, 64, 2)
    assert _held(graph, LayerStrategy.RECOMPUTE) == pytest.approx(real.saved_bytes, rel=0.03)
    assert _backward_flops(graph, LayerStrategy.RECOMPUTE) == pytest.approx(
        real.backward_flops, rel=0.005
    )


@pytest.mark.parametrize("size", [(81, 1), (144, 1)], ids=str)
@pytest.mark.parametrize("strategy", chunks.STRATEGIES["cpu"])
def test_layers_with_cross_attention_and_modulation(
    strategy: LayerStrategy, size: tuple[int, int]
) -> None:
    (case,) = (one for one in chunks.CASES["cpu"] if one.module.kind is ModuleKind.DIFFUSION)
    chunk = chunks.LayersChunk(case, "cpu")
    graph = transformer_layer(layer_spec(case.module), chunk.load(size), RunOptions.unfused())
    assert chunks.LAYERS * _held(graph, strategy) == pytest.approx(
        chunk.weigh(size, strategy).held_bytes, rel=0.03
    )
    ready = chunk.made(size, strategy)
    with megatron_layers.FlopCount() as counted:
        output = ready.run()
    assert chunks.LAYERS * graph.flops(Phase.FORWARD) == pytest.approx(counted.total, rel=0.005)
    with megatron_layers.FlopCount() as counted:
        output.sum().backward()
    assert chunks.LAYERS * _backward_flops(graph, strategy) == pytest.approx(
        counted.total, rel=0.005
    )
    parameters = sum(one.numel() for one in chunk.parameters(size))
    assert chunks.LAYERS * graph.parameters == parameters
