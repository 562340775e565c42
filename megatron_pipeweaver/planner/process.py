"""The planner's own process: reads requests from a socket that it inherits, answers with plans.

    python -m megatron_pipeweaver.planner.process SOCKET PARENT

It loads neither torch nor megatron, runs at low priority on at most half of the cores, and never
outlives the process that started it: a thread waits for the socket's end, and on Linux the kernel
ends it even while it is stopped.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.ir.codec import problem_to_json, schedule_to_json
from megatron_pipeweaver.partition.candidates import PerLayerCosts
from megatron_pipeweaver.planner.cache import RecentCache
from megatron_pipeweaver.planner.channel import Channel
from megatron_pipeweaver.planner.feedback import (
    Corrections,
    Feedback,
    median_error_permille,
    samples_of,
)
from megatron_pipeweaver.planner.headroom import Headroom
from megatron_pipeweaver.planner.messages import (
    Answer,
    Failure,
    Hurry,
    Launch,
    Learnt,
    Measurement,
    Message,
    PlanRequest,
    Ran,
    Ready,
    pack,
    unpack,
)
from megatron_pipeweaver.planner.planner import batch_digest
from megatron_pipeweaver.planner.ran import measurement_of
from megatron_pipeweaver.planner.settings import PlannerSettings
from megatron_pipeweaver.planner.stops import Stops
from megatron_pipeweaver.planner.wire import encode

_log = logging.getLogger(__name__)
NICENESS = 10
OUT_OF_MEMORY = 12
"""The process's exit code when memory ran out."""
_PR_SET_PDEATHSIG = 1
_PLANS_TO_MEASURE = 8

Inbox = queue.SimpleQueue[Message]


@dataclass(slots=True)
class PlanningDesk:
    """Makes plans by corrected costs, and corrects the costs by what plans took.

    Args:
        settings: the planner's.
        details: answer with the problem and the schedule, too.
        corrections: what is known from before.
        usable_permille: what plans may use of each rank's memory, as known from before.
        stops: by which another thread ends the search under way.
    """

    settings: PlannerSettings
    details: bool = False
    corrections: Corrections = field(default_factory=Corrections)
    usable_permille: tuple[int, ...] = ()
    stops: Stops = field(default_factory=Stops)
    _costs: PerLayerCosts = field(init=False)
    _feedback: Feedback = field(init=False)
    _planned_with: RecentCache[tuple[Corrections, Mapping[str, int] | None]] = field(init=False)
    _headroom: Headroom = field(init=False)

    def __post_init__(self) -> None:
        self._costs = self.settings.costs.make()
        self._feedback = Feedback(self.corrections)
        capacity_bytes = self.settings.memory_capacity_bytes
        self._headroom = Headroom(capacity_bytes, self.usable_permille)
        self._planned_with = RecentCache(_PLANS_TO_MEASURE)

    def answer(self, message: Message) -> bytes:
        """The answer to a request or a measurement.

        Raises:
            ConfigError: the message is another.
        """
        if isinstance(message, PlanRequest):
            return self._plan(message)
        if isinstance(message, Measurement):
            return self._learn(message)
        raise ConfigError(f"planner: {type(message).__name__} is nothing to answer")

    def _plan(self, request: PlanRequest) -> bytes:
        try:
            planner = self.settings.make(self._costs, self.usable_permille, self.corrections)
            planned = planner.plan(
                request.batch,
                forward_only=request.forward_only,
                budget_ns=request.budget_ns,
                stop=self.stops.begin(request.number),
            )
        except MemoryError:
            raise
        except Exception as error:  # no reason to end: the next batch may well be planned
            _log.debug("planning failed", exc_info=True)
            return pack(Failure(number=request.number, reason=f"{type(error).__name__}: {error}"))
        digest = batch_digest(request.batch)
        self._planned_with.put(
            (digest, request.forward_only), (self.corrections, planned.sub_microbatch)
        )
        parts = [encode(planned, digest)]
        if self.details:
            parts += [problem_to_json(planned.problem), schedule_to_json(planned.schedule)]
        return pack(Answer(number=request.number, sizes=tuple(map(len, parts))), *parts)

    def _learn(self, measured: Measurement) -> bytes:
        key = (batch_digest(measured.batch), measured.forward_only)
        corrections, sizes = self._planned_with.get(key) or (self.corrections, None)
        planner = self.settings.make(self._costs)
        sizes = self.settings.sub_microbatch if sizes is None else sizes
        workload = planner.workload(
            measured.batch, forward_only=measured.forward_only, sub_microbatch=sizes
        )
        samples = samples_of(
            measured.times,
            measured.batch,
            workload.problem,
            self.settings.model,
            self.settings.layout,
            sizes,
        )
        error = median_error_permille(samples, corrections)
        self._feedback.add(samples)
        self.corrections = self._feedback.corrections()
        self._headroom.add(measured.peaks)
        self.usable_permille = self._headroom.usable_permille()
        return pack(
            Learnt(
                error_permille=error,
                rows=self.corrections.rows,
                usable_permille=self.usable_permille,
            )
        )


def main(arguments: list[str]) -> int:
    """The life of the process; returns its exit code."""
    die_with_parent(int(arguments[1]))
    os.nice(NICENESS)
    with socket.socket(fileno=int(arguments[0])) as end:
        reader, writer = Channel(end.dup()), Channel(end.dup())
    try:
        serve(reader, writer)
    except TransferError:  # the training process is gone
        return 0
    except MemoryError:
        _log.error("planner process: out of memory")
        return OUT_OF_MEMORY


def serve(reader: Channel, writer: Channel) -> NoReturn:
    """Answer what comes in, for ever.

    Raises:
        TransferError: the training process is gone.
        ConfigError: it said what cannot be understood.
        MemoryError: there is not enough of it.
    """
    launch = _next(reader)
    if not isinstance(launch, Launch):
        raise ConfigError(f"planner: starts with {type(launch).__name__}; send Launch first")
    limit_memory(launch.memory_limit_bytes)
    desk = PlanningDesk(
        settings=launch.settings.with_threads(usable_cores() // 2),
        details=launch.details,
        usable_permille=launch.usable_permille,
        corrections=Corrections(launch.rows),
    )
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(reader, inbox, desk.stops), daemon=True).start()
    reply = pack(Ready(process=os.getpid()))
    while True:
        writer.send(reply)
        writer.flush()
        reply = desk.answer(_next_to_do(inbox))


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_memory(limit_bytes: int | None) -> None:
    """Let no more than `limit_bytes` of address space be used from now on."""
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends; Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(0)


def _next(reader: Channel) -> Message:
    data = reader.receive(None)
    assert data is not None  # without a time limit there is always one
    message, rest = unpack(data)
    return measurement_of(message, rest) if isinstance(message, Ran) else message


def _read(reader: Channel, inbox: Inbox, stops: Stops) -> None:
    """Move messages into `inbox`, hurry the search where it is told to.

    Ends the process, whatever it does, when no more can come.
    """
    try:
        while True:
            message = _next(reader)
            if isinstance(message, Hurry):
                stops.end(message.number)
            else:
                inbox.put(message)
    except TransferError:
        os._exit(0)
    except Exception:
        _log.exception("planner process: cannot read")
        os._exit(1)


def _next_to_do(inbox: Inbox) -> Message:
    """The next message; a request that a later one stands behind is out of date, and left out."""
    waiting = [inbox.get()]
    while not inbox.empty():
        waiting.append(inbox.get())
    latest = max((one.number for one in waiting if isinstance(one, PlanRequest)), default=0)
    todo = [one for one in waiting if not isinstance(one, PlanRequest) or one.number == latest]
    for one in todo[1:]:
        inbox.put(one)
    return todo[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
