"""The exchange between replicas: alone, hidden behind the pipeline, and of experts."""

from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ExpertOptions, LayerOptions, ModelSpec
from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.ir.schedule import ScheduledOp
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.exchange import (
    ChunkExchange,
    gather_delay_ns,
    rank_exchanges,
    reduced_ns,
)
from megatron_pipeweaver.semu.memory import OptimizerOptions, module_parameters, rank_states
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import module_preset


def _op(kind: OpKind, stage: int, start: int, end: int, microbatch: int = 0) -> ScheduledOp:
    key = OpKey(kind, microbatch, "m", 0, stage)
    return ScheduledOp(key=key, strategy="keep", start_ns=start, end_ns=end)


def _chunk(stage: int, reduce_ns: int, gather_ns: int) -> ChunkExchange:
    return ChunkExchange(module="m", stage=stage, reduce_ns=reduce_ns, gather_ns=gather_ns)


# Two chunks: forwards at 0 and 40, backwards of the second end at 70, of the first at 100.
OPS = (
    _op(OpKind.F, 0, 0, 20),
    _op(OpKind.F, 1, 40, 50),
    _op(OpKind.B, 1, 50, 65),
    _op(OpKind.W, 1, 65, 70),
    _op(OpKind.B, 0, 70, 100),
)


@pytest.mark.parametrize(
    ("second", "first", "expected"),
    [
        (10, 5, 105),  # the second chunk's gradients leave while the first one's are made
        (40, 5, 115),  # not all of them: 70 + 40, then the first one's
        (30, 0, 100),  # all hidden
    ],
)
def test_gradients_leave_when_their_last_backward_has_ended(
    second: int, first: int, expected: int
) -> None:
    chunks = (_chunk(0, first, 0), _chunk(1, second, 0))
    assert reduced_ns(chunks, OPS, overlap=True) == expected
    assert reduced_ns(chunks, OPS, overlap=False) == 100 + first + second


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (5, 10, 5),  # the second is there at 15, long before its forward
        (5, 50, 15),  # it is there at 55, 15 after it was to start
        (0, 40, 0),
    ],
)
def test_weights_come_in_front_of_their_first_forward(
    first: int, second: int, expected: int
) -> None:
    chunks = (_chunk(0, 0, first), _chunk(1, 0, second))
    assert gather_delay_ns(chunks, OPS, overlap=True) == expected
    assert gather_delay_ns(chunks, OPS, overlap=False) == first + second


def test_chunks_without_work_are_exchanged_behind_the_others() -> None:
    chunks = (_chunk(7, 30, 0), _chunk(1, 10, 0))
    assert reduced_ns(chunks, OPS, overlap=True) == 130
    assert reduced_ns(chunks, (), overlap=True) == 40


EXPERTS = replace(
    module_preset("qwen3-30b-a3b"),
    layers=2,
    layer=LayerOptions(experts=ExpertOptions(count=8, active=2, ffn_hidden_size=768)),
)
MODEL = ModelSpec(name="experts", modules=(EXPERTS,))
LAYOUT = ChunkLayout(
    pipeline_size=1, modules=(ModuleLayout(module="language", segments=1, layers=(2,)),)
)


def _options(data: int, expert: int) -> RunOptions:
    return RunOptions(parallel=ParallelSizes(pipeline=1, data=data, expert=expert))


def _reduce_ns(data: int, expert: int) -> int:
    costs = AnalyticCostModel(load_device("H800"), _options(data, expert))
    ((chunk,),) = rank_exchanges(MODEL, LAYOUT, costs, OptimizerOptions())
    return chunk.reduce_ns


def test_experts_are_spread_and_summed_over_those_that_hold_the_same() -> None:
    expert = 2 * 8 * 3 * 2048 * 768
    shared = module_parameters(EXPERTS) - expert
    assert module_parameters(EXPERTS, _options(8, 4)) == shared + expert // 4
    (whole,), (spread,) = (
        rank_states(MODEL, LAYOUT, _options(8, size), OptimizerOptions()) for size in (1, 4)
    )
    # A rank holds a quarter of the experts, but shares their state with 2 ranks, not with 8.
    assert whole.optimizer_bytes == spread.optimizer_bytes == 12 * (shared + expert) // 8
    assert spread.gradient_bytes == 4 * (shared + expert // 4)
    assert _reduce_ns(8, 8) < _reduce_ns(8, 4) < _reduce_ns(8, 1)


def test_frozen_modules_exchange_nothing() -> None:
    frozen = ModelSpec(name="frozen", modules=(replace(EXPERTS, frozen=True),))
    costs = AnalyticCostModel(load_device("H800"), _options(8, 1))
    assert rank_exchanges(frozen, LAYOUT, costs, OptimizerOptions()) == ((),)


def test_weights_are_gathered_by_a_distributed_optimizer_alone() -> None:
    costs = AnalyticCostModel(load_device("H800"), _options(8, 1))
    ((whole,),) = rank_exchanges(MODEL, LAYOUT, costs, OptimizerOptions(distributed=False))
    ((spread,),) = rank_exchanges(MODEL, LAYOUT, costs, OptimizerOptions())
    assert whole.gather_ns == 0 < spread.gather_ns
    assert whole.reduce_ns > spread.reduce_ns
    with pytest.raises(ConfigError, match="needs a distributed optimizer"):
        OptimizerOptions(distributed=False, overlap_param_gather=True)


def test_expert_groups_are_made_of_replicas() -> None:
    with pytest.raises(ConfigError, match="2 data x 1 context parallel ranks"):
        ParallelSizes(pipeline=1, data=2, expert=4)
