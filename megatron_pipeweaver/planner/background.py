"""Planning beside training: a process that plans the next iteration while this one runs.

    training   | iteration t ............................ | iteration t+1
               |   request(t+1)               collect(t+1) |   request(t+2)
    planner    |        |--- search --- plan ->|           |        |--- search ...

`collect` waits no longer than a bound; then, or when the planner died, hung or answered with what
is no plan for the batch, the iteration runs by the static plan made in this process, and training
goes on. A planner that died or hung is started again, a bounded number of times, ever later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_pipeweaver.config import SECOND_NS
from megatron_pipeweaver.errors import ConfigError, PipeWeaverError, PlanInvalidError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.codec import digest, to_bytes
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.plan import VerifiedPlan
from megatron_pipeweaver.ir.problem import PassKey
from megatron_pipeweaver.partition.workload import loads
from megatron_pipeweaver.planner.cache import PlanKey, RecentCache
from megatron_pipeweaver.planner.child import PLANNER_COMMAND, Child, RestartPolicy, start_child
from megatron_pipeweaver.planner.feedback import (
    CorrectionRow,
    Corrections,
)
from megatron_pipeweaver.planner.headroom import usable_bytes
from megatron_pipeweaver.planner.messages import (
    Answer,
    Failure,
    Hurry,
    Launch,
    Learnt,
    PlanRequest,
    pack,
)
from megatron_pipeweaver.planner.planner import batch_digest
from megatron_pipeweaver.planner.post import Arrived, Letter, Post
from megatron_pipeweaver.planner.ran import pack_ran
from megatron_pipeweaver.planner.settings import PlannerSettings, settings_to_json
from megatron_pipeweaver.planner.sharing import own_part
from megatron_pipeweaver.planner.source import Heard, PlanAnswer, PlanCounters, RanPlan
from megatron_pipeweaver.planner.wire import ReceivedPlan, encode

_log = logging.getLogger(__name__)
_OPEN_REQUESTS = 8
_INTERVALS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundConfig:
    """How far training relies on its planner's process.

    Training waits for a plan no longer than `wait_ns`. A planner that says nothing for `hang_ns`
    beyond its search time counts as hung. `learn` has measured times correct the costs; `details`
    has every answer bring its problem and schedule, for those who keep them.
    """

    wait_ns: int = 2 * SECOND_NS
    hang_ns: int = 60 * SECOND_NS
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    cached_plans: int = 32
    learn: bool = True
    details: bool = False
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.wait_ns < 0 or self.hang_ns < 0:
            raise ConfigError(
                f"background planner: wait_ns={self.wait_ns}, hang_ns={self.hang_ns}; need >= 0"
            )


@dataclass(slots=True, kw_only=True)
class _Open:
    """A request and what became of it."""

    key: PlanKey
    number: int
    sent_ns: int
    ahead: bool
    answer: PlanAnswer | PipeWeaverError | None = None
    failure: str = ""


class _NoPlanError(Exception):
    """Why there is no searched plan, told in the log; the counters know already."""


class BackgroundSource:
    """Plans in a process of its own; a `PlanSource`.

    Nothing starts before the first call of `start`, `request` or `collect`, so every rank may hold
    one; only the planning rank's comes to life.

    Args:
        settings: the planner's.
        config: how long to wait, and what for.
        command: starts the process; the numbers of its socket and of this process follow.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        settings: PlannerSettings,
        config: BackgroundConfig | None = None,
        *,
        command: Sequence[str] = PLANNER_COMMAND,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings = settings
        self._config = config = config or BackgroundConfig()
        self._command = tuple(command)
        self._clock = clock
        self._counters = PlanCounters()
        self._settings_bytes = settings_to_json(settings)
        self._costs = settings.costs.make()
        self._open: RecentCache[_Open] = RecentCache(_OPEN_REQUESTS)
        self._plans: RecentCache[PlanAnswer] = RecentCache(config.cached_plans)
        self._intervals_ns: deque[int] = deque(maxlen=_INTERVALS)
        self._errors_permille: list[int] = []
        self._child: Child | None = None
        self._post: Post | None = None
        self._may_start_ns: int | None = clock()
        self._silent_since_ns: int | None = None
        self._failures = 0
        self._number = 0
        self._learn((), ())

    @property
    def layout(self) -> ChunkLayout:
        """Where the layers live that are planned for."""
        return self._settings.layout

    @property
    def counters(self) -> PlanCounters:
        """What became of the plans so far."""
        return self._counters

    @property
    def errors_permille(self) -> tuple[int, ...]:
        """Per measured iteration, the median error of the stage times it was planned with."""
        return tuple(self._errors_permille)

    @property
    def process(self) -> int | None:
        """The number of the planner's process, where one runs."""
        return None if self._child is None else self._child.process.pid

    def start(self) -> None:
        """Start the process now, so that it is there when it is needed."""
        self._ensure_child()

    def own_part(self, shared: VerifiedPlan, batch: BatchMetadata) -> VerifiedPlan:
        """What the replica with `batch` runs of a plan for several."""
        settings = self._settings
        return own_part(shared, batch, settings.model, settings.costs.options.parallel)

    @property
    def plans_ahead(self) -> bool:
        """Always."""
        return True

    def request(
        self, batch: BatchMetadata, *, forward_only: bool, heard: Heard | None = None
    ) -> None:
        """Have `batch` planned; returns at once and raises nothing."""
        self._receive(0)
        name = (batch_digest(batch), forward_only)
        if self._open.get(name) is not None:
            return
        known = self._plans.get(self._key(*name))
        if known is None:
            self._send_request(batch, forward_only, ahead=True, heard=heard)
        elif heard is not None:
            heard(known)

    def collect(self, batch: BatchMetadata, *, forward_only: bool) -> PlanAnswer:
        """The plan that was searched for `batch`, or else a static one.

        Raises:
            PipeWeaverError: there is no static plan either.
        """
        started_ns = self._clock()
        try:
            answer = self._searched(batch, forward_only)
        except _NoPlanError as reason:
            answer = self._static_answer(batch, forward_only)
            self._count(static=1, wait_ns=self._clock() - started_ns)
            _log.warning("planner: %s; a static plan runs. %s", reason, self._counters)
        else:
            self._count(planned=1, wait_ns=self._clock() - started_ns)
        return answer

    @property
    def usable_bytes(self) -> tuple[int, ...]:
        """What plans use of each rank's memory, by what was measured so far."""
        return usable_bytes(self._settings.memory_capacity_bytes, self._usable_permille)

    def observe(self, batch: BatchMetadata, *, forward_only: bool, ran: RanPlan) -> None:
        """Have the planner learn how long the stages of `batch` took, and in how much memory."""
        if self._config.learn:
            self._send(partial(pack_ran, batch, forward_only, ran))

    def close(self) -> None:
        """End the process."""
        self._may_start_ns = None
        if self._child is not None and self._post is not None:
            self._post.close()
            self._child.leave()
        self._child = self._post = None

    # --- plans -----------------------------------------------------------------------------------

    def _searched(self, batch: BatchMetadata, forward_only: bool) -> PlanAnswer:
        """The searched plan for `batch`; raises `_NoPlanError` where there is none in time."""
        asked_ns = self._clock()
        self._receive(0)
        name = (batch_digest(batch), forward_only)
        found = self._open.get(name)
        if found is not None and found.ahead:
            self._intervals_ns.append(asked_ns - found.sent_ns)
        if found is None:
            cached = self._plans.get(self._key(*name))
            if cached is not None:
                self._count(cached=1)
                return cached
        # The process drops a request that a later one stands behind; then ask anew.
        if found is None or (found.answer is None and found.number != self._number):
            found = self._send_request(batch, forward_only, ahead=False)
        try:
            answer = self._await(found, asked_ns)
        finally:
            if found.answer is not None or found.failure:  # else it may still come of use
                self._open.drop(name)
        try:
            if isinstance(answer, PipeWeaverError):
                raise answer
            assert answer.received is not None
            self._check(answer.received, batch, forward_only)
        except PipeWeaverError as error:
            self._fail(f"answered with what is no plan for the batch: {error}")
            raise _NoPlanError("its answer is no plan for the batch") from error
        self._plans.put(found.key, answer)
        if self._exceeds(answer.received):
            raise _NoPlanError("its plan is from before memory was measured, and needs too much")
        return answer

    def _await(self, request: _Open, asked_ns: int) -> PlanAnswer | PipeWeaverError:
        """The answer to `request`; raises `_NoPlanError` where none comes in time.

        A search that had the whole iteration before is to end at once with the best it has; one
        that training waits for from its beginning, after half of the wait.
        """
        until_ns = asked_ns + self._config.wait_ns
        hurry_ns = asked_ns if request.ahead else asked_ns + self._config.wait_ns // 2
        hurried = False
        while request.answer is None:
            if request.failure:
                self._count(failed=1)
                raise _NoPlanError(request.failure)
            if self._child is None:
                raise _NoPlanError("it does not run")
            now_ns = self._clock()
            if not hurried and now_ns >= hurry_ns:
                hurried = True
                self._send(pack(Hurry(number=request.number)))
            left_ns = until_ns - now_ns
            if left_ns < 0:
                self._count(late=1)
                raise _NoPlanError(f"no plan within {self._config.wait_ns / 1e6:.0f} ms")
            self._receive(left_ns if hurried else min(left_ns, hurry_ns - now_ns))
        return request.answer

    def _check(self, received: ReceivedPlan, batch: BatchMetadata, forward_only: bool) -> None:
        """Returns when `received` runs exactly the passes of `batch`."""
        plan = received.plan.plan
        settings = self._settings
        counts: dict[tuple[int, str], int] = {}
        for index, one in enumerate(batch.microbatches):
            alone = BatchMetadata(microbatches=(one,))
            for module, _ in loads(alone, settings.model, settings.sub_microbatch):
                counts[index, module] = counts.get((index, module), 0) + 1
        passes = {PassKey(*key, sub) for key, count in counts.items() for sub in range(count)}
        found = (
            received.batch_digest,
            plan.forward_only,
            plan.pipeline_size,
            dict(plan.modules),
            {one.key for one in plan.passes},
        )
        expected = (
            batch_digest(batch),
            forward_only,
            self.layout.pipeline_size,
            {one.module: one.segments for one in self.layout.modules},
            passes,
        )
        if found != expected:
            raise PlanInvalidError("the planner's plan is for another batch or model; ask again")

    def _exceeds(self, received: ReceivedPlan) -> bool:
        """Whether a rank would hold more than its usable memory."""
        peaks = received.plan.peak_memory_bytes
        return any(peak > usable for peak, usable in zip(peaks, self.usable_bytes, strict=True))

    def _static_answer(self, batch: BatchMetadata, forward_only: bool) -> PlanAnswer:
        planner = self._settings.make(self._costs, self._usable_permille, self._corrections)
        planned = planner.static_plan(batch, forward_only=forward_only)
        data = encode(planned, batch_digest(batch))
        return PlanAnswer(data=data, received=None, planned=lambda: planned)

    def _key(self, batch: str, forward_only: bool) -> PlanKey:
        return PlanKey(
            batch_digest=batch, forward_only=forward_only, settings_digest=self._settings_digest
        )

    # --- talk ------------------------------------------------------------------------------------

    def _send_request(
        self, batch: BatchMetadata, forward_only: bool, *, ahead: bool, heard: Heard | None = None
    ) -> _Open:
        name = (batch_digest(batch), forward_only)
        self._ensure_child()
        self._number += 1
        made = _Open(key=self._key(*name), number=self._number, sent_ns=self._clock(), ahead=ahead)
        if self._post is None:
            return made
        self._open.put(name, made)
        if heard is not None:
            self._post.tell(made.number, heard)
        if not ahead:  # whatever is searched for now is not what training waits for
            self._send(pack(Hurry(number=made.number - 1)))
        request = PlanRequest(
            number=made.number,
            batch=batch,
            forward_only=forward_only,
            budget_ns=self._budget_ns(ahead=ahead),
        )
        self._send(partial(pack, request))
        if self._silent_since_ns is None:
            self._silent_since_ns = made.sent_ns
        return made

    def _budget_ns(self, *, ahead: bool) -> int:
        """How long a search is of use: until training asks, as far as the past tells."""
        most = self._settings.search.time_budget_ns
        if not ahead:
            return min(most, self._config.wait_ns // 2)
        return min([most, *(3 * one // 4 for one in self._intervals_ns)])

    def _send(self, letter: Letter) -> None:
        if self._post is not None:
            self._post.send(letter)

    def _receive(self, timeout_ns: int) -> None:
        """Take in all that has come; waits up to `timeout_ns` for the first message."""
        timeout_s = timeout_ns / SECOND_NS
        try:
            while self._post is not None:
                arrived = self._post.receive(timeout_s)
                if arrived is None:
                    break
                self._take(arrived)
                timeout_s = 0.0
        except PipeWeaverError as error:
            self._fail(f"ended ({error})")
            return
        silent = self._silent_since_ns
        limit_ns = self._config.hang_ns + self._settings.search.time_budget_ns
        if self._child is not None and silent is not None and self._clock() - silent > limit_ns:
            self._fail("hangs")

    def _take(self, arrived: Arrived) -> None:
        """One message of the planner."""
        message = arrived.message
        answered = False
        if isinstance(message, Learnt):
            self._errors_permille.append(message.error_permille)
            _log.info("planner: stage times off by %.1f %%", message.error_permille / 10)
            self._learn(message.rows, message.usable_permille)
        elif isinstance(message, Answer | Failure):
            answered = message.number == self._number
            for one in self._open.values():
                if one.number == message.number and isinstance(message, Answer):
                    one.answer = arrived.answer
                elif one.number == message.number and isinstance(message, Failure):
                    one.failure = message.reason
        if self._silent_since_ns is not None:
            self._silent_since_ns = None if answered else self._clock()

    def _learn(self, rows: Sequence[CorrectionRow], usable_permille: tuple[int, ...]) -> None:
        """Plan, and know plans again, by these corrections and in this share of the memory."""
        corrections = self._corrections = Corrections(rows)
        self._usable_permille = usable_permille
        self._settings_digest = digest(
            self._settings_bytes + to_bytes(corrections.coarse()) + to_bytes(list(usable_permille))
        )

    # --- life ------------------------------------------------------------------------------------

    def _ensure_child(self) -> None:
        """Start the process where none runs and its time has come."""
        due_ns = self._may_start_ns
        if self._child is not None or due_ns is None or self._clock() < due_ns:
            return
        if self._failures:
            self._count(restarted=1)
        launch = Launch(
            settings=self._settings,
            rows=self._corrections.rows,
            usable_permille=self._usable_permille,
            details=self._config.details,
            memory_limit_bytes=self._config.memory_limit_bytes,
        )
        try:
            self._child = start_child(self._command)
        except OSError as error:
            self._fail(f"cannot be started ({error})")
            return
        self._post = Post(self._child.channel)
        self._send(pack(launch))

    def _fail(self, what: str) -> None:
        """The process is of no use any more: end it, and start another one later, if at all."""
        code = None
        if self._child is not None and self._post is not None:
            code = self._child.process.poll()
            self._post.close()
            self._child.end()
        self._child = self._post = None
        self._silent_since_ns = None
        self._open = RecentCache(_OPEN_REQUESTS)
        self._failures += 1
        self._count(failed=1)
        delay_ns = self._config.restarts.delay_ns(self._failures)
        self._may_start_ns = None if delay_ns is None else self._clock() + delay_ns
        _log.warning(
            "planner: its process %s, exit code %s; %s",
            what,
            code,
            "static plans from now on" if delay_ns is None else "it will be started again",
        )

    def _count(self, **more: int) -> None:
        self._counters = self._counters.plus(**more)
