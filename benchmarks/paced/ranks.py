"""One rank of a paced pipeline: PipeWeaver's executor and Megatron's function, by turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from benchmarks.paced.cases import TINY, PacedCase, PlannedBatch
from benchmarks.paced.interleaving import ChunkCost
from benchmarks.paced.megatron import MegatronSetting
from benchmarks.paced.pace import Pace, PacedTimes, measured_margin_ns, paced
from benchmarks.turns import timed
from megatron_pipeweaver.ir.plan import PlanPass
from megatron_pipeweaver.ir.problem import OpKey, OpKind, dependencies
from megatron_pipeweaver.ir.timeline import StrategyTable
from megatron_pipeweaver.runtime.executor import Executor
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.stage import ModuleStages
from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport
from tests.distributed.harness import RankContext
from tests.distributed.training import megatron_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One iteration on all ranks: from the common start to the last rank's end, in real time."""

    system: str
    batch: int
    repeat: int
    measured_ns: int
    emulated_ns: int


def run_case(ctx: RankContext, case: PacedCase, scale: tuple[int, int], repeats: int) -> Any:
    """Every batch under every system, by turns; what rank 0 measured."""
    torch.set_num_threads(1)
    pace = Pace(numerator=scale[0], denominator=scale[1], margin_ns=measured_margin_ns())
    transport = ProcessGroupTransport(
        [range(ctx.size)], device=torch.device("cpu"), timeout=timedelta(seconds=100)
    )
    rows: list[Measured] = []
    for repeat in range(repeats):
        for index, planned in enumerate(case.planned):
            ctx.note(f"batch {index}: PipeWeaver")
            measured_ns = timed(partial(run_planned, ctx.rank, pace, planned, transport))
            rows.append(_row("pipeweaver", index, repeat, measured_ns, planned.emulated_ns))
        for setting in case.megatron:
            with megatron_ranks(ctx.size, setting.chunks):
                for index, emulated_ns in enumerate(setting.emulated_ns):
                    ctx.note(f"batch {index}: {setting.name}")
                    chunks = megatron_chunks(ctx, pace, setting, index)
                    measured_ns = timed(partial(run_megatron, chunks))
                    rows.append(_row(setting.name, index, repeat, measured_ns, emulated_ns))
    return [
        Measured(
            system=one.system,
            batch=one.batch,
            repeat=one.repeat,
            measured_ns=one.measured_ns,
            emulated_ns=pace.scaled(one.emulated_ns),
        )
        for one in rows
    ]


def _row(system: str, batch: int, repeat: int, measured_ns: int, emulated_ns: int) -> Measured:
    return Measured(
        system=system, batch=batch, repeat=repeat, measured_ns=measured_ns, emulated_ns=emulated_ns
    )


# --- PipeWeaver ----------------------------------------------------------------------------------


class _PacedStages:
    """A rank's stages, all of them: each pass's times by op and strategy."""

    def __init__(self, pace: Pace, planned: PlannedBatch) -> None:
        self._pace = pace
        self._graph = planned.problem.graph
        self._table = StrategyTable(planned.problem)
        self._anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def run(self, strategy: str, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]) -> Tensor:
        """One forward under `strategy`."""
        del one
        found = self._table.find(op, strategy)
        assert found is not None  # the verified plan was made from this problem
        forward = op.with_kind(OpKind.F)
        times = PacedTimes(
            forward_ns=found.forward_ns,
            backward_ns=found.backward_ns + found.weight_grad_ns,
            input_latencies_ns=tuple(
                wait.latency_ns for wait in dependencies(self._graph, forward) if wait.carries_data
            ),
            gradient_latency_ns=self._graph.nodes[op.owner].p2p_latency_ns,
        )
        return paced(self._pace, times, inputs, self._anchor)


def run_planned(
    rank: int, pace: Pace, planned: PlannedBatch, transport: ProcessGroupTransport
) -> None:
    """This rank's actions of one iteration, by PipeWeaver's executor."""
    plan = planned.plan.plan
    stages = _PacedStages(pace, planned)
    names = {
        strategy.name
        for _, one in planned.problem.passes()
        for stage in one.stages
        for strategy in stage
    }
    chunk = torch.nn.Module()
    modules = {
        (module, stage): chunk
        for module, segments in plan.modules.items()
        for stage in range(plan.pipeline_size * segments)
    }
    strategies = {name: partial(_run_stage, stages, name) for name in names}
    runner = ModuleStages(plan, modules, lambda _, output: 0.0 * output.sum(), strategies)
    Executor(rank, runner, transport, Recorder(0)).run(planned.plan)


def _run_stage(
    stages: _PacedStages,
    strategy: str,
    module: torch.nn.Module,
    one: PlanPass,
    op: OpKey,
    inputs: tuple[Tensor, ...],
) -> Tensor:
    del module
    return stages.run(strategy, one, op, inputs)


# --- Megatron ------------------------------------------------------------------------------------


class _MegatronChunk(torch.nn.Module):
    """A model chunk as Megatron's schedule sees it, whose layers wait."""

    def __init__(self, config: Any, pace: Pace, rows: Sequence[PacedTimes], virtual: int) -> None:
        super().__init__()
        self.config = config
        self.vp_stage = virtual
        self.model_type = None
        self._pace = pace
        self.rows = rows
        self._input: Tensor | None = None
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def set_input_tensor(self, tensors: Any) -> None:
        """As Megatron hands it over."""
        self._input = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, microbatch: int) -> Tensor:
        """The chunk on one microbatch."""
        inputs = () if self._input is None else (self._input,)
        return paced(self._pace, self.rows[microbatch], inputs, self.anchor)


def megatron_chunks(
    ctx: RankContext, pace: Pace, setting: MegatronSetting, batch: int
) -> list[_MegatronChunk]:
    """This rank's chunks for one batch."""
    virtual_size = setting.chunks if setting.chunks > 1 else None
    config = TransformerConfig(
        num_layers=ctx.size * setting.chunks,
        hidden_size=TINY[2],
        num_attention_heads=1,
        pipeline_dtype=torch.float64,
        params_dtype=torch.float64,
        pipeline_model_parallel_size=ctx.size,
        virtual_pipeline_model_parallel_size=virtual_size,
        # The fastest settings of Megatron's interleaved function; the other one takes none.
        overlap_p2p_comm=virtual_size is not None,
        batch_p2p_comm=False,
        overlap_p2p_comm_warmup_flush=virtual_size is not None,
        # 0.16.1 frees outputs under sends that gloo has not finished.
        deallocate_pipeline_outputs=False,
    )
    costs = setting.costs[batch]
    chunks = []
    for virtual in range(setting.chunks):
        stage = virtual * ctx.size + ctx.rank
        before = costs[stage - 1] if stage else None
        rows = [
            _paced_times(cost, None if before is None else before[index])
            for index, cost in enumerate(costs[stage])
        ]
        chunks.append(_MegatronChunk(config, pace, rows, virtual))
    return chunks


def _paced_times(cost: ChunkCost, before: ChunkCost | None) -> PacedTimes:
    return PacedTimes(
        forward_ns=cost.forward_ns,
        backward_ns=cost.backward_ns,
        input_latencies_ns=() if before is None else (before.latency_ns,),
        gradient_latency_ns=cost.latency_ns,
    )


def run_megatron(chunks: list[_MegatronChunk]) -> None:
    """One iteration by Megatron's own function for as many chunks per rank."""
    schedule = get_forward_backward_func()
    count = len(chunks[0].rows)
    schedule(
        forward_step_func=_forward_step,
        data_iterator=[iter(range(count)) for _ in chunks] if chunks[1:] else iter(range(count)),
        model=list(chunks) if chunks[1:] else chunks[0],
        num_microbatches=count,
        seq_length=TINY[0],
        micro_batch_size=TINY[1],
        forward_only=False,
    )


def _forward_step(iterator: Iterator[int], model: torch.nn.Module) -> Any:
    return model(next(iterator)), _loss


def _loss(output: Tensor) -> Any:
    return 0.0 * output.sum(), {}
