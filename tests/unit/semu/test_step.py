import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.memory import OptimizerOptions
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import module_preset
from megatron_pipeweaver.semu.step import StepReport, emulate_step, forward_flops, utilisation

MODEL = ModelSpec(name="text", modules=(module_preset("llama3-8b"),))
LAYOUT = ChunkLayout(
    pipeline_size=2, modules=(ModuleLayout(module="language", segments=1, layers=(16, 16)),)
)


def _op(stage: int, start: int, end: int) -> ScheduledOp:
    key = OpKey(OpKind.F, 0, "language", 0, stage)
    return ScheduledOp(key=key, strategy="keep", start_ns=start, end_ns=end)


SCHEDULE = Schedule(
    problem_sha256="",
    makespan_ns=300,
    lower_bound_ns=300,
    peak_memory_bytes=(1000, 2000),
    ranks=((_op(0, 0, 100),), (_op(1, 100, 300),)),
)


def _step(data: int, *, distributed: bool = True) -> StepReport:
    parallel = ParallelSizes(pipeline=2, tensor=4, data=data)
    costs = AnalyticCostModel(load_device("H800"), RunOptions(parallel=parallel))
    return emulate_step(
        schedule=SCHEDULE,
        model=MODEL,
        layout=LAYOUT,
        costs=costs,
        model_flops=10**15,
        reserve_bytes=7,
        optimizer=OptimizerOptions(distributed=distributed),
    )


def test_busy_time_bubbles_and_peaks_are_per_rank() -> None:
    step = _step(1)
    assert step.pipeline_ns == 300
    assert step.busy_ns == (100, 200)
    assert step.bubble_ns == (200, 100)
    assert [
        peak - state for peak, state in zip(step.peak_bytes, step.state_bytes, strict=True)
    ] == [
        1007,
        2007,
    ]


def test_one_replica_exchanges_nothing() -> None:
    assert _step(1).gradient_exchange_ns == (0, 0)
    assert min(_step(2).gradient_exchange_ns) > 0


def test_a_distributed_optimizer_updates_and_holds_its_share() -> None:
    whole, spread = _step(8, distributed=False), _step(8)
    assert max(spread.optimizer_ns) < max(whole.optimizer_ns) / 4
    assert max(spread.state_bytes) < max(whole.state_bytes)


def test_iteration_ends_with_the_slowest_exchange_update_and_gather() -> None:
    step = _step(4)
    assert step.exposed_exchange_ns == step.gradient_exchange_ns
    assert step.iteration_ns > 300 + max(step.optimizer_ns)
    tails = [a + b for a, b in zip(step.gradient_exchange_ns, step.optimizer_ns, strict=True)]
    # Each rank starts when its own schedule has ended, here at 100 and 300 ns.
    assert 100 + tails[0] <= step.iteration_ns <= 300 + max(tails)


def test_mfu_is_one_when_all_ranks_compute_all_the_time() -> None:
    parallel = ParallelSizes(pipeline=2, tensor=4, data=16)
    assert utilisation(8 * 10**12, 10**9, parallel, 10**12) == pytest.approx(1.0)


def test_forward_flops_are_twice_the_parameters_per_token_plus_attention() -> None:
    module = module_preset("llama3-8b")
    options = RunOptions(parallel=ParallelSizes(pipeline=1, tensor=4))
    count = forward_flops(module, Load(sequence=128, batch=1, lengths=(128,)), options)
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # no embedding, no norms
    attention = 32 * 4 * 4096 * (128 * 129 // 2)
    assert count == 2 * matrices * 128 + attention


def test_a_7b_model_needs_the_papers_flops() -> None:
    # The paper's 7B batch takes 12.8 PFLOP: 4.068 s at an MFU of 0.400 on 8 H800.
    paper = 4.068 * 0.400 * 8 * 989 * 10**12
    assert paper == pytest.approx(12.8 * 10**15, rel=0.01)
    load = Load(sequence=8192, batch=1, lengths=(8192,))
    batch = 32 * 3 * forward_flops(module_preset("qwen2-7b"), load, RunOptions())
    assert batch == pytest.approx(12.8 * 10**15, rel=0.05)


def test_a_schedule_of_another_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 2 ranks, the layout 1"):
        emulate_step(
            schedule=SCHEDULE,
            model=MODEL,
            layout=ChunkLayout(
                pipeline_size=1,
                modules=(ModuleLayout(module="language", segments=1, layers=(32,)),),
            ),
            costs=AnalyticCostModel(load_device("H800"), RunOptions()),
            model_flops=1,
        )
