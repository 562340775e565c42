"""SEMU's diffusion layer against a real one: FLOPs, kept bytes, parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_pipeweaver.ir.lmm import LayerOptions, Modulation, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.strategies import held_tensors, recomputed
from megatron_pipeweaver.semu.work import Phase, Subgraph

megatron_layers = pytest.importorskip("tests.unit.semu.megatron_layers")
HIDDEN = 128


@dataclass(frozen=True)
class Case:
    modulation: Modulation
    clips: tuple[int, ...]
    prompts: tuple[int, ...]
    qk_norm: bool = True
    dropout: float = 0.0

    @property
    def module(self) -> ModuleSpec:
        return ModuleSpec(
            name="video",
            kind=ModuleKind.DIFFUSION,
            layers=1,
            hidden_size=HIDDEN,
            ffn_hidden_size=384,
            attention_heads=8,
            kv_groups=8,
            patch_size=2,
            layer=LayerOptions(
                context_size=HIDDEN, modulation=self.modulation, qk_norm=self.qk_norm
            ),
        )

    @property
    def graph(self) -> Subgraph:
        load = Load(
            sequence=sum(self.clips),
            batch=1,
            lengths=self.clips,
            context_lengths=self.prompts,
        )
        options = RunOptions.unfused(dropout=self.dropout > 0)
        return transformer_layer(layer_spec(self.module), load, options)


CASES = {
    "table, one clip": Case(Modulation.TABLE, (96,), (20,)),
    "table, clips": Case(Modulation.TABLE, (64, 24, 40), (9, 20, 3)),
    "table, no norm of heads": Case(Modulation.TABLE, (64, 24), (9, 20), qk_norm=False),
    "linear, one clip": Case(Modulation.LINEAR, (96,), (20,)),
    "linear, clips": Case(Modulation.LINEAR, (64, 24, 40), (9, 20, 3)),
    "dropout": Case(Modulation.TABLE, (64, 24, 40), (9, 20, 3), dropout=0.1),
}


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    with megatron_layers.one_rank():
        yield


def _measured(case: Case, *, recompute: bool = False) -> Any:
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from megatron_pipeweaver.models.diffusion_layer import diffusion_layer_spec
    from megatron_pipeweaver.models.options import ModelOptions
    from megatron_pipeweaver.models.packing import block_mask, packed_sequences

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=384,
        num_attention_heads=8,
        hidden_dropout=case.dropout,
        attention_dropout=case.dropout,
        qk_layernorm=case.qk_norm,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    options = ModelOptions(transformer_engine=False)
    layer = build_module(
        diffusion_layer_spec(case.module, options), config=config, layer_number=1
    ).train()
    cpu = torch.device("cpu")
    rows = len(case.clips) * case.modulation.time_tokens + sum(case.prompts)
    context = torch.randn(rows, 1, HIDDEN).requires_grad_(True)
    masks = [block_mask(case.clips, other, cpu) for other in (case.clips, case.prompts)]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer(
            hidden,
            attention_mask=masks[0],
            context=context,
            context_mask=masks[1],
            packed_seq_params=packed_sequences(case.clips, cpu, case.prompts),
        )[0]
        return found

    hidden = torch.randn(sum(case.clips), 1, HIDDEN).requires_grad_(True)
    given = [context, *(mask for mask in masks if mask is not None)]
    return megatron_layers.observe(layer, run, hidden, given=given, recompute=recompute)


def _held(graph: Subgraph, strategy: LayerStrategy) -> int:
    return sum(one.size_bytes for one in held_tensors(graph, recomputed(strategy, graph)))


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    case = CASES[name]
    real, graph = _measured(case), case.graph
    backward = graph.flops(Phase.INPUT_GRAD) + graph.flops(Phase.WEIGHT_GRAD)
    assert graph.parameters == real.parameters
    assert graph.flops(Phase.FORWARD) == pytest.approx(real.forward_flops, rel=0.005)
    assert backward == pytest.approx(real.backward_flops, rel=0.005)
    assert _held(graph, LayerStrategy.KEEP) == pytest.approx(real.saved_bytes, rel=0.03)


@pytest.mark.parametrize("name", ["table, clips", "linear, clips"])
def test_full_recompute(name: str) -> None:
    case = CASES[name]
    real, graph = _measured(case, recompute=True), case.graph
    again = sum(graph.flops(phase) for phase in Phase)
    assert _held(graph, LayerStrategy.RECOMPUTE) == pytest.approx(real.saved_bytes, rel=0.03)
    assert again == pytest.approx(real.backward_flops, rel=0.005)
