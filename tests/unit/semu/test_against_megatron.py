"""SEMU's layers against megatron-core's own: FLOPs, kept bytes, parameters, by strategy."""

from collections.abc import Iterator

import pytest

from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.strategies import held_tensors, recomputed
from megatron_pipeweaver.semu.work import Phase, Subgraph

megatron_layers = pytest.importorskip("tests.unit.semu.megatron_layers")

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


SPECS = {
    "gpt": _spec(),
    "gpt, rotary": _spec(rotary=True),
    "gpt, grouped": _spec(groups=2),
    "llama": _spec(**LLAMA),
    "llama, grouped": _spec(groups=2, **LLAMA),
    "qwen2": _spec(groups=2, **{**LLAMA, "qkv_bias": True}),
    "qwen3": _spec(groups=2, head_size=32, qk_norm=True, **LLAMA),
    "qwen3, ungrouped": _spec(qk_norm=True, **LLAMA),
    "vit": _spec(causal=False),
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


@pytest.mark.parametrize("name", ["gpt", "llama, grouped", "vit"])
def test_layer_with_dropout(name: str) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec, dropout=0.1)
    real = megatron_layers.measure(layer, 64, 2, rotary=spec.rotary)
    graph = _graph(spec, 64, 2, dropout=True)
    assert _held(graph, LayerStrategy.KEEP) == pytest.approx(real.saved_bytes, rel=0.03)


@pytest.mark.parametrize("name", ["gpt", "llama, grouped", "vit"])
def test_attention_recompute(name: str) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec, recompute=["core_attn"])
    real = megatron_layers.measure(layer, 64, 2, rotary=spec.rotary)
    held = _held(_graph(spec, 64, 2), LayerStrategy.ATTENTION)
    assert held == pytest.approx(real.saved_bytes, rel=0.03)


@pytest.mark.parametrize("name", ["gpt", "llama, grouped", "qwen3", "vit"])
def test_full_recompute(name: str) -> None:
    spec = SPECS[name]
    layer = megatron_layers.make_layer(spec)
    real = megatron_layers.measure(layer, 64, 2, rotary=spec.rotary, recompute=True)
    graph = _graph(spec, 64, 2)
    again = sum(graph.flops(phase) for phase in Phase)
    assert _held(graph, LayerStrategy.RECOMPUTE) == pytest.approx(real.saved_bytes, rel=0.03)
    assert again == pytest.approx(real.backward_flops, rel=0.005)
