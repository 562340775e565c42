"""Point to point between pipeline ranks: one process group per directed pair of neighbours.

    rank 0 ──► rank 1 ──► rank 2 ──► rank 3 ──► rank 0      activations, the wrap-around included
    rank 0 ◄── rank 1 ◄── rank 2 ◄── rank 3 ◄── rank 0      gradients

Sends in both directions of one pair may be pending at once, and unbatched ones on one NCCL
communicator could block each other; so each direction has a communicator of its own. NCCL matches
a pair's messages in the order in which both ends post them, gloo by tag: the plan's message
numbers serve both.

Messages are posted in groups, as a rule of one. On NCCL a group is one kernel, and every message
goes as a group: `torch.distributed` has other communicators for messages that do not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import format_op

_POLL_S = 0.0005
"""Between two looks at what is under way on the device."""


class Pending(Protocol):
    """A message that was posted."""

    def wait(self) -> Tensor:
        """The tensor, once it has arrived or its memory may be reused.

        Raises:
            TransferError: the peer is gone, or did not do its part in time.
        """


class Transport(Protocol):
    """How the executor moves tensors; posting never blocks.

    The messages of one call are of one directed rank pair. The other end posts just these in one
    call as well, and a wait for one of them may last until all are there.
    """

    def isend(self, messages: Sequence[Message], tensors: Sequence[Tensor]) -> Sequence[Pending]:
        """Post each of `tensors` as one of `messages` to their target rank."""

    def irecv(self, messages: Sequence[Message]) -> Sequence[Pending]:
        """Post the receives of `messages` from their source rank."""

    def finish(self) -> None:
        """Return once all that was awaited has gone through, if waits do not block the host.

        Raises:
            TransferError: for as long as a wait may last nothing has gone through.
        """


def describe(message: Message) -> str:
    """``vision0.F3 > vision1.F3 (1024 bytes)``: the message in errors."""
    return f"{format_op(message.source)} > {format_op(message.target)} ({message.size_bytes} bytes)"


def directed_pairs(pipelines: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """All neighbours of all pipelines, in both directions, as global ranks, in one order.

    Raises:
        ConfigError: a rank stands in two pipelines, or twice in one.
    """
    ranks = [rank for pipeline in pipelines for rank in pipeline]
    if len(set(ranks)) != len(ranks):
        raise ConfigError(f"pipelines {[list(one) for one in pipelines]}: a rank stands twice")
    pairs = set()
    for pipeline in pipelines:
        for rank, following in zip(pipeline, [*pipeline[1:], *pipeline[:1]], strict=True):
            if rank != following:
                pairs |= {(rank, following), (following, rank)}
    return tuple(sorted(pairs))


class ProcessGroupTransport:
    """Messages over `torch.distributed`, by the same code on gloo and NCCL.

    Every rank of the job makes one at the same point: the groups of all pipelines are created,
    and each link is tried once, in one order everywhere.

    Args:
        pipelines: the global ranks of every pipeline replica of the job, each by pipeline rank.
        device: where received tensors go.
        timeout: how long a wait may last. On a GPU waits are put on the stream, so there it is
            `finish` that tells of one that does not end; NCCL's own watchdog, which ends the
            process, has twice as much patience.
        backend: ``gloo`` or ``nccl``; the default group's where it is `None`.

    Raises:
        TransferError: a link does not work.
    """

    def __init__(
        self,
        pipelines: Sequence[Sequence[int]],
        *,
        device: torch.device,
        timeout: timedelta,
        backend: str | None = None,
    ) -> None:
        self._device = device
        self._timeout = timeout
        self._rank = dist.get_rank()
        self._pipeline = next((tuple(one) for one in pipelines if self._rank in one), ())
        self._blocking = device.type == "cpu"  # a wait with a time limit blocks the host
        pairs = directed_pairs(pipelines)
        patience = timeout if self._blocking else 2 * timeout
        groups = {
            pair: dist.new_group(sorted(pair), timeout=patience, backend=backend) for pair in pairs
        }
        self._groups: dict[tuple[int, int], Any] = {
            pair: group for pair, group in groups.items() if self._rank in pair
        }
        self._awaited: list[_Awaited] = []
        for pair in self._groups:
            self._try_link(*pair)

    def isend(self, messages: Sequence[Message], tensors: Sequence[Tensor]) -> Sequence[Pending]:
        """Post `tensors`; they must stay as they are until their sends were awaited."""
        return self._post(messages, [one.contiguous() for one in tensors], sending=True)

    def irecv(self, messages: Sequence[Message]) -> Sequence[Pending]:
        """Post the receives into new tensors of the messages' shapes and types."""
        tensors = [
            torch.empty(one.shape, dtype=getattr(torch, one.dtype), device=self._device)
            for one in messages
        ]
        return self._post(messages, tensors, sending=False)

    def _post(
        self, messages: Sequence[Message], tensors: Sequence[Tensor], *, sending: bool
    ) -> Sequence[Pending]:
        first = messages[0]
        pair = self._pipeline[first.source_rank], self._pipeline[first.target_rank]
        post, peer = (dist.isend, pair[1]) if sending else (dist.irecv, pair[0])
        where = f"to rank {first.target_rank}" if sending else f"from rank {first.source_rank}"
        operations = [
            dist.P2POp(post, tensor, peer, group=self._groups[pair], tag=one.sequence)
            for one, tensor in zip(messages, tensors, strict=True)
            if tensor.numel()
        ]
        try:
            works = iter(_post_as_one(operations))
        except RuntimeError as error:
            raise _failure(first, where, "", _first_line(error)) from error
        return [
            self._pending(one, tensor, next(works), where) if tensor.numel() else _Done(tensor)
            for one, tensor in zip(messages, tensors, strict=True)
        ]

    def _pending(self, message: Message, tensor: Tensor, work: Any, where: str) -> Pending:
        if self._blocking:
            return _Posted(message, tensor, work, where, self._timeout)
        return _OnStream(message, tensor, work, where, self._awaited)

    def finish(self) -> None:
        """See `Transport`; on a GPU the host waits for its stream to come past all waits."""
        awaited, self._awaited[:] = tuple(self._awaited), ()
        for one in awaited:
            if not _comes(one.passed, self._timeout):
                limit = f" within {self._timeout.total_seconds():g} s"
                raise _failure(one.message, one.where, limit, "nothing has come past it")

    def _try_link(self, source: int, target: int) -> None:
        """One byte over the link: connects it now, since connecting later would block a post."""
        probe = torch.zeros(1, dtype=torch.uint8, device=self._device)
        post, peer = (dist.isend, target) if self._rank == source else (dist.irecv, source)
        group = self._groups[source, target]
        where = f"link from global rank {source} to {target}"
        try:
            for work in _post_as_one([dist.P2POp(post, probe, peer, group=group)]):
                work.wait()
        except RuntimeError as error:
            raise TransferError(f"{where}: {_first_line(error)}; see that rank's log") from error
        if not self._blocking and not _comes(_passed(), self._timeout):
            raise TransferError(
                f"{where}: no byte came through within {self._timeout.total_seconds():g} s; see "
                "that rank's log"
            )


def _passed() -> Any:
    """An event behind all that the current stream has been given so far."""
    return torch.cuda.current_stream().record_event()


def _comes(event: Any, timeout: timedelta) -> bool:
    """Whether the device comes past `event` within `timeout`; looks again and again."""
    deadline = time.monotonic() + timeout.total_seconds()
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _post_as_one(operations: Sequence[dist.P2POp]) -> Sequence[Any]:
    """Post `operations` of one process group; what to wait for, for each of them."""
    if not operations:
        return ()
    works = dist.batch_isend_irecv(list(operations))
    # NCCL has one for all.
    return works if len(works) == len(operations) else [works[0]] * len(operations)


class _Done:
    """A message of no bytes needs no wire."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class _Awaited(NamedTuple):
    """A wait on a stream: of what, and an event behind it."""

    message: Message
    where: str
    passed: Any


class _OnStream:
    """A posted send or receive whose wait is put on the device's stream."""

    def __init__(
        self, message: Message, tensor: Tensor, work: Any, where: str, awaited: list[_Awaited]
    ) -> None:
        self._message = message
        self._tensor = tensor
        self._work = work
        self._where = where
        self._awaited = awaited

    def wait(self) -> Tensor:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _failure(self._message, self._where, "", _first_line(error)) from error
        self._awaited.append(_Awaited(self._message, self._where, _passed()))
        return self._tensor


class _Posted:
    """A posted send or receive; holds the tensor until it was awaited."""

    def __init__(
        self, message: Message, tensor: Tensor, work: Any, where: str, timeout: timedelta
    ) -> None:
        self._message = message
        self._tensor = tensor
        self._work = work
        self._where = where
        self._timeout = timeout

    def wait(self) -> Tensor:
        try:
            self._work.wait(self._timeout)
        except RuntimeError as error:
            limit = f" within {self._timeout.total_seconds():g} s"
            raise _failure(self._message, self._where, limit, _first_line(error)) from error
        return self._tensor


def _failure(message: Message, where: str, limit: str, reason: str) -> TransferError:
    return TransferError(
        f"{describe(message)} {where} did not go through{limit}; see that rank's log ({reason})"
    )


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
