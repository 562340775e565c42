"""A planner's channel with a thread in each direction, so that training neither packs nor reads.

    training | send ─► queue ─► pack, write ─► planner
             | receive ◄─ queue ◄─ read, unpack, verify ◄─ planner

What goes out leaves in order; what comes in waits, verified, until training looks.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError
from megatron_pipeweaver.ir.codec import problem_from_json, schedule_from_json
from megatron_pipeweaver.planner.channel import Channel
from megatron_pipeweaver.planner.messages import Answer, Message, split_parts, unpack
from megatron_pipeweaver.planner.planner import PlannedIteration
from megatron_pipeweaver.planner.source import Heard, PlanAnswer
from megatron_pipeweaver.planner.wire import ReceivedPlan, decode

Letter = bytes | Callable[[], bytes]
"""A message, or what packs it: whatever takes a while to pack is packed by the writing thread."""
_LEAVE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A message of the planner; `answer` is the plan that it brings, or why it is none."""

    message: Message
    answer: PlanAnswer | PipeWeaverError | None = None


class Post:
    """Both directions of a channel to the planner's process.

    Args:
        channel: this end of it; nobody else may use it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._outgoing: queue.SimpleQueue[Letter | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[Arrived | PipeWeaverError] = queue.SimpleQueue()
        # One alone, since a planner drops requests that a later one stands behind.
        self._heard: tuple[int, Heard] | None = None
        self._threads = [
            threading.Thread(target=work, daemon=True, name="planner post")
            for work in (self._write, self._read)
        ]
        for one in self._threads:
            one.start()

    def send(self, letter: Letter) -> None:
        """Have `letter` written; returns at once."""
        self._outgoing.put(letter)

    def tell(self, number: int, heard: Heard) -> None:
        """Call `heard` with the plan that answers request `number`, in another thread, if any.

        Who was to be told of an earlier request no longer is.
        """
        self._heard = number, heard

    def receive(self, timeout_s: float) -> Arrived | None:
        """The next message; `None` when `timeout_s` passed without one.

        Raises:
            TransferError: the other end is gone.
            ConfigError: what arrives is no message.
        """
        with contextlib.suppress(queue.Empty):
            found = self._incoming.get(timeout_s > 0, max(0.0, timeout_s))
            if isinstance(found, PipeWeaverError):
                raise found
            return found
        return None

    def close(self) -> None:
        """End both directions; what was not written is lost."""
        self._outgoing.put(None)
        self._channel.shut_down()
        for one in self._threads:
            one.join(_LEAVE_S)

    def _write(self) -> None:
        # That the other end is gone is seen by who reads.
        with contextlib.suppress(PipeWeaverError), self._channel.twin() as channel:
            while (letter := self._outgoing.get()) is not None:
                channel.send(letter if isinstance(letter, bytes) else letter())
                channel.flush()

    def _read(self) -> None:
        try:
            while True:
                data = self._channel.receive(None)
                assert data is not None  # without a time limit there is always one
                self._incoming.put(self._opened(*unpack(data)))
        except PipeWeaverError as error:
            self._incoming.put(error)

    def _opened(self, message: Message, rest: bytes) -> Arrived:
        if not isinstance(message, Answer):
            return Arrived(message=message)
        try:
            answer = _read_answer(split_parts(message.sizes, rest))
        except PipeWeaverError as error:
            return Arrived(message=message, answer=error)
        asked = self._heard
        if asked is not None and asked[0] == message.number:
            asked[1](answer)
        return Arrived(message=message, answer=answer)


def _read_answer(parts: tuple[bytes, ...]) -> PlanAnswer:
    """What the planner sent as it goes on from here.

    Raises:
        ConfigError: the bytes are damaged.
        PlanInvalidError: the plan breaks a rule.
    """
    if not parts:
        raise ConfigError("planner message: an answer without a plan")
    received = decode(parts[0], "plan from the planner's process")
    return PlanAnswer(
        data=parts[0], received=received, planned=lambda: _read_details(received, parts[1:])
    )


def _read_details(received: ReceivedPlan, parts: tuple[bytes, ...]) -> PlannedIteration | None:
    if len(parts) != 2:
        return None
    return PlannedIteration(
        plan=received.plan,
        problem=problem_from_json(parts[0]),
        schedule=schedule_from_json(parts[1]),
        baselines=received.baselines,
        search_ns=received.search_ns,
        origin=received.origin,
    )
