"""SEMU on random layers: monotone, additive, never negative, the same with and without reuse."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import (
    ExpertOptions,
    LayerOptions,
    Modulation,
    ModuleKind,
    ModuleSpec,
)
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.reuse import Reuse

ALL = tuple(LayerStrategy)


@st.composite
def modules(draw: st.DrawFn) -> ModuleSpec:
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.sampled_from([1, 2]))
    head_size = draw(st.sampled_from([8, 16]))
    kind = draw(st.sampled_from(ModuleKind))
    experts = ExpertOptions(count=4, active=2, ffn_hidden_size=32, shared_ffn_hidden_size=16)
    return ModuleSpec(
        name="one",
        kind=kind,
        layers=6,
        hidden_size=heads * head_size,
        ffn_hidden_size=draw(st.sampled_from([32, 64])),
        attention_heads=heads,
        kv_groups=groups,
        gated_mlp=draw(st.booleans()),
        vocab_size=50 if kind in {ModuleKind.LANGUAGE, ModuleKind.TEXT} else None,
        output_size=48,
        layer=LayerOptions(
            qk_norm=draw(st.booleans()),
            rotary=draw(st.booleans()),
            window=draw(st.sampled_from([None, 4])),
            experts=draw(st.sampled_from([None, experts])),
            context_size=draw(st.sampled_from([None, 24])),
            modulation=draw(st.sampled_from([None, *Modulation])),
        ),
    )


@st.composite
def options(draw: st.DrawFn) -> RunOptions:
    tensor, expert = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    return RunOptions(
        parallel=ParallelSizes(
            pipeline=2,
            tensor=tensor,
            data=expert,
            expert=expert,
            sequence_parallel=tensor > 1 and draw(st.booleans()),
        ),
        attention=draw(st.sampled_from(Attention)),
        fused_norm=draw(st.booleans()),
        fused_activation=draw(st.booleans()),
        fused_linear=draw(st.booleans()),
        dropout=draw(st.booleans()),
    )


@st.composite
def loads(draw: st.DrawFn) -> Load:
    sequence = draw(st.sampled_from([4, 8, 12, 24]))
    batch = draw(st.integers(1, 3))
    return Load(
        sequence=sequence,
        batch=batch,
        lengths=(sequence,) * batch,
        output_tokens=sequence * batch // 2,
        context_lengths=(5,) * batch,
    )


def _model(run: RunOptions, *, reuse: bool = True) -> AnalyticCostModel:
    return AnalyticCostModel(load_device("H800"), run, strategies=ALL, reuse=Reuse(enabled=reuse))


def _stage(layers: int, first: int = 1) -> StageShape:
    return StageShape(layers=layers, is_first=False, is_last=False, first_layer=first)


def _numbers(one: Strategy) -> tuple[int, int, int, int]:
    return one.forward_ns, one.backward_ns, one.weight_grad_ns, one.memory_bytes


@settings(max_examples=40, deadline=None)
@given(modules(), options(), loads(), st.booleans(), st.booleans())
def test_reuse_changes_nothing(
    module: ModuleSpec, run: RunOptions, load: Load, first: bool, last: bool
) -> None:
    stage = StageShape(layers=3, is_first=first, is_last=last)
    once, anew = _model(run), _model(run, reuse=False)
    expected = anew.stage_strategies(module, stage, load)
    assert once.stage_strategies(module, stage, load) == expected
    assert once.stage_strategies(module, stage, load) == expected
    assert once.reuse.hits > 0
    assert anew.reuse.hits == 0


@settings(max_examples=40, deadline=None)
@given(modules(), options(), loads())
def test_more_items_take_longer_and_hold_more(
    module: ModuleSpec, run: RunOptions, load: Load
) -> None:
    more = replace(
        load,
        batch=load.batch + 1,
        lengths=(*load.lengths, load.sequence),
        output_tokens=load.output_tokens + load.sequence // 2,
        context_lengths=(*load.context_lengths, 5),
    )
    model, stage = _model(run), StageShape(layers=2, is_first=True, is_last=True)
    for less, greater in zip(
        model.stage_strategies(module, stage, load),
        model.stage_strategies(module, stage, more),
        strict=True,
    ):
        assert less.forward_ns <= greater.forward_ns
        assert (
            less.backward_ns + less.weight_grad_ns <= greater.backward_ns + greater.weight_grad_ns
        )
        assert less.memory_bytes <= greater.memory_bytes


@settings(max_examples=40, deadline=None)
@given(modules(), options(), loads(), st.integers(1, 3), st.integers(1, 3))
def test_layers_add_up(
    module: ModuleSpec, run: RunOptions, load: Load, one: int, other: int
) -> None:
    if module.layer.context_size is not None:
        load = replace(load, context_lengths=())
        module = replace(module, layer=replace(module.layer, context_size=None))
    model = _model(run)
    for strategy, whole in zip(
        ALL, model.stage_strategies(module, _stage(one + other), load), strict=True
    ):
        if strategy is LayerStrategy.OFFLOAD:
            continue  # copies of one layer hide behind another
        parts = [
            next(
                found
                for found in model.stage_strategies(module, stage, load)
                if found.name == strategy
            )
            for stage in (_stage(one), _stage(other, first=1 + one))
        ]
        assert _numbers(whole) == tuple(
            sum(numbers) for numbers in zip(*map(_numbers, parts), strict=True)
        )


@settings(max_examples=40, deadline=None)
@given(modules(), options(), loads())
def test_strategies_trade_time_for_memory(module: ModuleSpec, run: RunOptions, load: Load) -> None:
    model, stage = _model(run), StageShape(layers=2, is_first=True, is_last=True)
    found = {one.name: one for one in model.stage_strategies(module, stage, load)}
    keep, lean = found[LayerStrategy.KEEP], found[LayerStrategy.RECOMPUTE]
    for one in found.values():
        assert min(_numbers(one)) >= 0
        assert one.forward_ns > 0
        assert lean.memory_bytes <= one.memory_bytes <= keep.memory_bytes or (
            one.name == LayerStrategy.OFFLOAD
        )
        assert one.backward_ns >= keep.backward_ns
    assert model.working_bytes(module, stage, load) >= 0
