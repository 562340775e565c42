"""Point to point between pipeline ranks: one process group per directed pair of neighbours.

    rank 0 ──► rank 1 ──► rank 2 ──► rank 3 ──► rank 0      activations, the wrap-around included
    rank 0 ◄── rank 1 ◄── rank 2 ◄── rank 3 ◄── rank 0      gradients

Sends in both directions of one pair may be pending at once, and unbatched ones on one NCCL
communicator could block each other; so each direction has a communicator of its own. NCCL matches
a pair's messages in the order in which both ends post them, gloo by tag: the plan's message
numbers serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import format_op


class Pending(Protocol):
    """A message that was posted."""

    def wait(self) -> Tensor:
        """The tensor, once it has arrived or its memory may be reused.

        Raises:
            TransferError: the peer is gone, or did not do its part in time.
        """


class Transport(Protocol):
    """How the executor moves tensors; posting never blocks."""

    def isend(self, message: Message, tensor: Tensor) -> Pending:
        """Post `tensor` as `message` to its target rank."""

    def irecv(self, message: Message) -> Pending:
        """Post the receive of `message` from its source rank."""


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
        timeout: how long a wait may last. NCCL waits on the stream, so there it is NCCL's
            watchdog that ends the process.
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
        pairs = directed_pairs(pipelines)
        groups = {
            pair: dist.new_group(sorted(pair), timeout=timeout, backend=backend) for pair in pairs
        }
        self._groups: dict[tuple[int, int], Any] = {
            pair: group for pair, group in groups.items() if self._rank in pair
        }
        self._blocking = device.type == "cpu"  # a wait with a time limit blocks the host
        for pair in self._groups:
            self._try_link(*pair)

    def isend(self, message: Message, tensor: Tensor) -> Pending:
        """Post `tensor`; it must stay as it is until the send was awaited."""
        pair = self._pair(message)
        tensor = tensor.contiguous()
        if tensor.numel() == 0:
            return _Done(tensor)
        return self._post(dist.isend, pair[1], message, tensor, f"to rank {message.target_rank}")

    def irecv(self, message: Message) -> Pending:
        """Post the receive into a new tensor of the message's shape and type."""
        pair = self._pair(message)
        dtype = getattr(torch, message.dtype)
        tensor = torch.empty(message.shape, dtype=dtype, device=self._device)
        if tensor.numel() == 0:
            return _Done(tensor)
        return self._post(dist.irecv, pair[0], message, tensor, f"from rank {message.source_rank}")

    def _pair(self, message: Message) -> tuple[int, int]:
        return self._pipeline[message.source_rank], self._pipeline[message.target_rank]

    def _post(
        self,
        post: Callable[..., Any],
        peer: int,
        message: Message,
        tensor: Tensor,
        where: str,
    ) -> Pending:
        group = self._groups[self._pair(message)]
        try:
            work = post(tensor, peer, group=group, tag=message.sequence)
        except RuntimeError as error:
            raise _failure(message, where, "", error) from error
        return _Posted(message, tensor, work, where, self._timeout if self._blocking else None)

    def _try_link(self, source: int, target: int) -> None:
        """One byte over the link: connects it now, since connecting later would block a post."""
        probe = torch.zeros(1, dtype=torch.uint8, device=self._device)
        group = self._groups[source, target]
        try:
            if self._rank == source:
                dist.send(probe, target, group=group)
            else:
                dist.recv(probe, source, group=group)
        except RuntimeError as error:
            raise TransferError(
                f"link from global rank {source} to {target}: {_first_line(error)}; see that "
                "rank's log"
            ) from error


class _Done:
    """A message of no bytes needs no wire."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class _Posted:
    """A posted send or receive; holds the tensor until it was awaited."""

    def __init__(
        self, message: Message, tensor: Tensor, work: Any, where: str, timeout: timedelta | None
    ) -> None:
        self._message = message
        self._tensor = tensor
        self._work = work
        self._where = where
        self._timeout = timeout

    def wait(self) -> Tensor:
        try:
            if self._timeout is None:
                self._work.wait()
            else:
                self._work.wait(self._timeout)
        except RuntimeError as error:
            limit = "" if self._timeout is None else f" within {self._timeout.total_seconds():g} s"
            raise _failure(self._message, self._where, limit, error) from error
        return self._tensor


def _failure(message: Message, where: str, limit: str, error: RuntimeError) -> TransferError:
    return TransferError(
        f"{describe(message)} {where} did not go through{limit}; see that rank's log "
        f"({_first_line(error)})"
    )


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
