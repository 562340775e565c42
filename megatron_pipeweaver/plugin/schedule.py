"""The function that stands where Megatron's schedules stood: plan, agree, run, finish gradients."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_pipeweaver.errors import PipeWeaverError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.plan import Plan, VerifiedPlan
from megatron_pipeweaver.ir.trace import ActionTimes, Trace
from megatron_pipeweaver.planner.headroom import MemoryPeak
from megatron_pipeweaver.planner.planner import PlannedIteration, Planner, batch_digest
from megatron_pipeweaver.planner.source import InProcessSource, PlanAnswer, PlanSource, RanPlan
from megatron_pipeweaver.planner.wire import SENT_AHEAD, ReceivedPlan, decode, encode_failure
from megatron_pipeweaver.plugin import compat
from megatron_pipeweaver.plugin.communicators import Communicators, connect
from megatron_pipeweaver.plugin.data import (
    DataIterator,
    DescribeMicrobatch,
    LookAhead,
    describe_batch,
    is_replaying,
)
from megatron_pipeweaver.plugin.duties import (
    finish_gradients,
    no_gradient_sync,
    refuse_unsupported,
    timed,
)
from megatron_pipeweaver.plugin.gathers import gathered_parameters
from megatron_pipeweaver.plugin.sharing import SharedBatch, share_batch
from megatron_pipeweaver.plugin.stages import MegatronStages, StepContext
from megatron_pipeweaver.runtime.activations import AllocatorGauge, MemoryGauge, TensorGauge
from megatron_pipeweaver.runtime.agreement import agree, broadcast_bytes
from megatron_pipeweaver.runtime.clock import DeviceClock, HostClock
from megatron_pipeweaver.runtime.courier import Round
from megatron_pipeweaver.runtime.executor import Executor, look_at
from megatron_pipeweaver.runtime.offload import copy_stream
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.watchdog import WatchConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationReport:
    """What is known of an iteration when it has run.

    `answer` is there on the planning rank only; `batch` on ranks that load data. `measured_ns`
    is this rank's wall-clock time from the first to the last action, `times` and memory `peaks`
    the whole pipeline's where they are gathered.
    """

    iteration: int
    forward_only: bool
    received: ReceivedPlan
    answer: PlanAnswer | None
    batch: BatchMetadata | None
    measured_ns: int
    times: ActionTimes | None
    peaks: tuple[MemoryPeak, ...] = ()

    @property
    def planned(self) -> PlannedIteration | None:
        """Problem and schedule behind the plan, where they are known; made anew in each call."""
        return None if self.answer is None else self.answer.planned()

    @property
    def trace(self) -> Trace | None:
        """All rows of all ranks, where times were gathered; made anew in each call."""
        plan = self.received.plan
        return None if self.times is None else self.times.trace(plan.plan, plan.fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What a rank has of an iteration's batch, or why it has nothing."""

    microbatches: Sequence[Mapping[str, Any] | None] = ()
    batch: BatchMetadata | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agreed:
    """The plan that all ranks hold: as it was `made`, and as this replica runs it, `received`.

    They differ where replicas share a plan. `answer` is there on the planning rank.
    """

    made: VerifiedPlan
    received: ReceivedPlan
    answer: PlanAnswer | None


class PipeWeaverSchedule:
    """Megatron's forward-backward function for models made of PipeWeaver's chunks.

    Args:
        source: makes the plans, on one rank of each replica; of a bare planner, in this process.
        describe: reads a microbatch's metadata.
        gather_traces: collect every iteration's trace from all ranks of the pipeline; plans can
            learn from measured times and memory only where this is on.
        account_tensors: measure memory tensor by tensor where there is no CUDA allocator to ask,
            at a cost per saved tensor.
        on_iteration: told of every iteration when it has run, on every rank.
        wait_timeout: how long a wait for another rank may last before it ends with an error.
        watch: when to tell where all ranks stand.
    """

    def __init__(
        self,
        source: Planner | PlanSource,
        describe: DescribeMicrobatch,
        *,
        gather_traces: bool = False,
        account_tensors: bool = False,
        on_iteration: Callable[[IterationReport], None] | None = None,
        wait_timeout: timedelta = timedelta(minutes=10),
        watch: WatchConfig | None = None,
    ) -> None:
        self._source = InProcessSource(source) if isinstance(source, Planner) else source
        self._look_ahead = LookAhead()
        self._describe = describe
        self._gather_traces = gather_traces
        self._account_tensors = account_tensors
        self._on_iteration = on_iteration
        self._wait_timeout = wait_timeout
        self._watch = watch or WatchConfig()
        self._communicators: Communicators | None = None
        self._copies: Any = None
        self._made: tuple[PlanAnswer | None, bytes] | None = None
        self._early: Round[ReceivedPlan] | None = None
        self._iteration = 0

    @property
    def layout(self) -> ChunkLayout:
        """Where the layers live that this schedule runs."""
        return self._source.layout

    def owns(self, model: torch.nn.Module | Sequence[torch.nn.Module]) -> bool:
        """Whether `model` is made of PipeWeaver's chunks."""
        chunks = model if isinstance(model, Sequence) else [model]
        return len(chunks) > 0 and all(_has_place(chunk) for chunk in chunks)

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: DataIterator,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """One iteration: forward and backward of all microbatches, gradients finalised.

        Takes Megatron's arguments; shapes come from the batch's metadata, transfers have their
        own communicators, so `seq_length`, `micro_batch_size`, `decoder_seq_length` and
        `p2p_communicator` are not needed.

        Returns:
            What the loss function reported, by microbatch, on the last stage; elsewhere ``[]``.
        """
        del seq_length, micro_batch_size, decoder_seq_length, p2p_communicator
        chunks = list(model) if isinstance(model, Sequence) else [model]
        config = get_model_config(chunks[0])
        refuse_unsupported(config, adjust_tensor_shapes_fn)
        groups = pg_collection or compat.default_pg_collection()
        if self._communicators is None:
            self._communicators = connect(groups.pp, self._wait_timeout, self._watch)
        with timed(config):
            again = is_replaying(data_iterator)
            load = self._load(data_iterator, num_microbatches)
            batch = share_batch(load.batch, load.failure, self._communicators)
            agreed = self._plan_for(batch, forward_only, self._communicators, again)
            plan = agreed.received.plan
            with self._round(self._communicators) as ahead:
                self._request_next(data_iterator, num_microbatches, forward_only, again, ahead)
                context = StepContext(
                    forward_step_func=forward_step_func,
                    model=chunks,
                    microbatches=load.microbatches,
                    config=config,
                    forward_only=forward_only,
                    collect_non_loss_data=collect_non_loss_data,
                    first_val_step=first_val_step,
                )
                gauge = self._gauge(chunks)
                stages = self._stages(context, plan.plan, gauge)
                start_ns = time.perf_counter_ns()
                with gathered_parameters(chunks), no_gradient_sync(config):
                    recorder = self._execute(plan, stages, self._communicators)
                measured_ns = time.perf_counter_ns() - start_ns
            # Here, since gradients are finalised in memory that plans do not speak of.
            peak_bytes = None if gauge is None else gauge.peak_bytes
            if not forward_only:
                finish_gradients(chunks, config, stages.num_tokens, groups, force_all_reduce)
        times, peaks = self._measured(plan, recorder, peak_bytes)
        self._report(agreed, batch, forward_only, measured_ns, times, peaks)
        return stages.losses()

    def _stages(
        self, context: StepContext, plan: Plan, gauge: MemoryGauge | None
    ) -> MegatronStages:
        """What computes this rank's stages of `plan`."""
        assert self._communicators is not None
        rank = self._communicators.pipeline_rank
        return MegatronStages(context, self.layout, plan, gauge, self._copy_stream(), rank=rank)

    def _execute(
        self, verified: VerifiedPlan, stages: MegatronStages, ranks: Communicators
    ) -> Recorder:
        """Run this rank's actions, watched; what they took."""
        with ranks.watchdog.watching(verified.plan, self._iteration) as at:
            # Events cost a little, and nobody reads times that are not gathered.
            on_device = self._gather_traces and torch.cuda.is_available()
            clock = DeviceClock() if on_device else HostClock()
            recorder = Recorder(self._iteration, clock=clock, on_action=at)
            if self._gather_traces:
                recorder.start(ranks.pipeline)
            Executor(ranks.pipeline_rank, stages, ranks.transport, recorder).run(verified)
        return recorder

    def _load(self, data_iterator: DataIterator, count: int) -> _Load:
        """This rank's microbatches and their metadata, or why it has none."""
        try:
            microbatches = self._look_ahead.take(data_iterator, count)
            batch = describe_batch(microbatches, self._describe)
        except Exception as error:
            _log.exception("no batch on this rank")
            return _Load(failure=f"{type(error).__name__}: {error}")
        return _Load(microbatches=microbatches, batch=batch)

    def _plan_for(
        self, batch: SharedBatch, forward_only: bool, ranks: Communicators, again: bool
    ) -> _Agreed:
        """The plan for exactly this batch, equal on every rank that runs it.

        An iteration that Megatron has run `again`, to see whether its results come back, has the
        plan that it had: results are compared in the order in which they come.
        Whatever fails on one rank is told to all in one exchange, so that none waits for it.
        """
        answer = None
        message = None
        early = self._early
        if self._plans():
            if self._made is None or not again:
                self._made = self._make_plan(batch, forward_only)
            answer, message = self._made
            if answer is not None and early is not None and early.brought(answer.data):
                message = SENT_AHEAD
        data = broadcast_bytes(message, ranks.control, ranks.planning_rank)
        agreed, failure = None, batch.failure
        held = {"plan": "", "batch": "" if batch.planned is None else batch_digest(batch.planned)}
        try:
            known = None if answer is None else answer.received
            if known is None and data == SENT_AHEAD and early is not None:
                known = early.result(self._wait_timeout)
            received = decode(data) if known is None else known
            held["plan"] = received.plan.fingerprint
            held["batch"] = held["batch"] or received.batch_digest
            own = received.plan
            if len(ranks.replicas) > 1 and batch.own is not None:
                own = self._source.own_part(received.plan, batch.own)
            agreed = _Agreed(
                made=received.plan, received=replace(received, plan=own), answer=answer
            )
        except PipeWeaverError as error:
            failure = failure or str(error)
        agree(held, ranks.control, failure=failure)
        assert agreed is not None  # else `agree` has raised, here and everywhere
        return agreed

    def _make_plan(self, batch: SharedBatch, forward_only: bool) -> tuple[PlanAnswer | None, bytes]:
        """The plan and its bytes, or the reason why there is none.

        Whatever goes wrong here, the ranks that wait must hear of it, so nothing may escape.
        """
        if batch.planned is None:
            reason = (
                batch.failure or "it loads no data; give the first pipeline rank a data iterator"
            )
            return None, encode_failure(reason)
        try:
            answer = self._source.collect(batch.planned, forward_only=forward_only)
            return answer, answer.data
        except Exception as error:
            _log.debug("planning failed", exc_info=True)
            return None, encode_failure(f"{type(error).__name__}: {error}")

    @contextlib.contextmanager
    def _round(self, ranks: Communicators) -> Iterator[Round[ReceivedPlan] | None]:
        """While the iteration runs, its plan's successor goes to all ranks as soon as it is there.

        Every rank begins a round in every iteration; one in which nothing was planned in time
        brings nothing.
        """
        if not self._source.plans_ahead:
            yield None
            return

        def read(data: bytes) -> ReceivedPlan:
            received = decode(data)
            look_at(received.plan.plan, ranks.pipeline_rank)
            return received

        self._early = made = Round(ranks.ahead, ranks.planning_rank, read, self._early)
        try:
            yield made
        finally:
            made.close()

    def _plans(self) -> bool:
        """Whether this is the rank that plans."""
        ranks = self._communicators
        return ranks is not None and torch.distributed.get_rank() == ranks.planning_rank

    def _request_next(
        self,
        data_iterator: DataIterator,
        count: int,
        forward_only: bool,
        again: bool,
        ahead: Round[ReceivedPlan] | None,
    ) -> None:
        """Have the next iteration planned while this one runs, as far as its batch is known."""
        ranks = self._communicators
        assert ranks is not None
        # Replicas that share a plan all tell of their batches, whatever is asked for then.
        alone = len(ranks.replicas) == 1
        if alone and (again or not self._plans()):
            return
        first = any(torch.distributed.get_rank() == one[0] for one in ranks.replicas)
        following = self._look_at_next(data_iterator, count) if first else None
        batch = share_batch(following, "", ranks).planned
        if batch is None or not self._plans() or again:
            return

        def heard(answer: PlanAnswer) -> None:
            if ahead is not None and answer.received is not None:
                ahead.offer(answer.data)
                look_at(answer.received.plan.plan, ranks.pipeline_rank)

        self._source.request(batch, forward_only=forward_only, heard=heard)

    def _look_at_next(self, data_iterator: DataIterator, count: int) -> BatchMetadata | None:
        """What this rank loads next, as far as that is known."""
        try:
            microbatches = self._look_ahead.peek(data_iterator, count)
            return None if microbatches is None else describe_batch(microbatches, self._describe)
        except Exception:
            # Whoever takes this batch meets the same error, and tells all ranks of it.
            _log.debug("no look at the next batch", exc_info=True)
            return None

    def _gauge(self, chunks: Sequence[torch.nn.Module]) -> MemoryGauge | None:
        """What measures this rank's memory in the iteration that begins, if anything does."""
        if not self._gather_traces:
            return None
        if torch.cuda.is_available():
            return AllocatorGauge()
        if not self._account_tensors:
            return None
        return TensorGauge(one for chunk in chunks for one in chunk.parameters())

    def _copy_stream(self) -> Any:
        """Where copies to the host run, the same stream in all iterations.

        CUDA's allocator keeps a pool of memory per stream and gives none of it to another.
        """
        if self._copies is None:
            self._copies = copy_stream()
        return self._copies

    def _measured(
        self, verified: VerifiedPlan, recorder: Recorder, peak_bytes: int | None
    ) -> tuple[ActionTimes | None, tuple[MemoryPeak, ...]]:
        """All pipeline ranks' times and memory peaks, as far as anything measures them."""
        if not self._gather_traces or self._communicators is None:
            return None, ()
        times = recorder.gather(self._communicators.pipeline, peak_bytes)
        peaks = tuple(
            MemoryPeak(planned_bytes=planned, measured_bytes=measured)
            for planned, measured in zip(verified.peak_memory_bytes, times.peak_bytes, strict=True)
            if measured is not None
        )
        return times, peaks

    def _report(
        self,
        agreed: _Agreed,
        batch: SharedBatch,
        forward_only: bool,
        measured_ns: int,
        times: ActionTimes | None,
        peaks: tuple[MemoryPeak, ...],
    ) -> None:
        received, answer = agreed.received, agreed.answer
        if times is not None and batch.planned is not None and answer is not None:
            ran = RanPlan(
                answer=answer, made=agreed.made, own=received.plan, times=times, peaks=peaks
            )
            self._source.observe(batch.planned, forward_only=forward_only, ran=ran)
        if self._on_iteration is not None:
            self._on_iteration(
                IterationReport(
                    iteration=self._iteration,
                    forward_only=forward_only,
                    received=received,
                    answer=answer,
                    batch=batch.own,
                    measured_ns=measured_ns,
                    times=times,
                    peaks=peaks,
                )
            )
        self._iteration += 1


def _has_place(model: torch.nn.Module) -> bool:
    try:
        get_attr_wrapped_model(model, "place")
    except RuntimeError:
        return False
    return True
