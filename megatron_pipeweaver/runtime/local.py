"""Pipeline ranks as threads of one process: the same transport without a network.

Rendezvous semantics, as strict as gloo's: a send's wait ends once the peer has posted the
receive, a receive's once the peer has posted the send. Messages are matched by their numbers, as
gloo does by tags, or by the order in which each end posts them, as NCCL does, which knows no tags.
Of messages that are posted as one none has gone through before all have, as on NCCL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Condition

from torch import Tensor

from megatron_pipeweaver.errors import TransferError
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.runtime.transfer import Pending, describe

_Key = tuple[int, int, int]  # source rank, target rank, number


class LocalNetwork:
    """What the ranks' transports share.

    Args:
        timeout_s: bounds every wait.
        by_order: match the messages of a directed rank pair by the order of their posts.
    """

    def __init__(self, timeout_s: float = 10.0, *, by_order: bool = False) -> None:
        self.timeout_s = timeout_s
        self.by_order = by_order
        self._changed = Condition()
        self._sent: dict[_Key, Tensor | None] = {}
        self._wanted: set[_Key] = set()

    def post_send(self, key: _Key, tensor: Tensor) -> None:
        """Lay `tensor` out for the receiver."""
        with self._changed:
            self._sent[key] = tensor
            self._changed.notify_all()

    def post_receive(self, key: _Key) -> None:
        """Tell the sender that the receive is posted."""
        with self._changed:
            self._wanted.add(key)
            self._changed.notify_all()

    def await_receive(self, key: _Key) -> bool:
        """Whether the receive of `key` was posted in time."""
        with self._changed:
            return self._changed.wait_for(lambda: key in self._wanted, self.timeout_s)

    def await_send(self, key: _Key) -> bool:
        """Whether `key` was sent in time."""
        with self._changed:
            return self._changed.wait_for(lambda: key in self._sent, self.timeout_s)

    def take(self, key: _Key) -> Tensor:
        """The tensor that was sent as `key`; once."""
        with self._changed:
            tensor, self._sent[key] = self._sent[key], None
        assert tensor is not None
        return tensor


class LocalTransport:
    """One rank's end of a `LocalNetwork`, for one run of one plan."""

    def __init__(self, network: LocalNetwork) -> None:
        self._network = network
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()

    def isend(self, messages: Sequence[Message], tensors: Sequence[Tensor]) -> Sequence[Pending]:
        """Post copies of `tensors`."""
        keys = [self._key(one, self._sent) for one in messages]
        for key, tensor in zip(keys, tensors, strict=True):
            self._network.post_send(key, tensor.clone())
        return [
            _Send(self._network, one, keys, tensor)
            for one, tensor in zip(messages, tensors, strict=True)
        ]

    def irecv(self, messages: Sequence[Message]) -> Sequence[Pending]:
        """Post the receives of `messages`."""
        keys = [self._key(one, self._received) for one in messages]
        for key in keys:
            self._network.post_receive(key)
        return [
            _Receive(self._network, one, keys, key) for one, key in zip(messages, keys, strict=True)
        ]

    def finish(self) -> None:
        """All waits have blocked."""

    def _key(self, message: Message, posted: Counter[tuple[int, int]]) -> _Key:
        pair = message.source_rank, message.target_rank
        posted[pair] += 1
        return (*pair, posted[pair] - 1 if self._network.by_order else message.sequence)


class _Send:
    def __init__(
        self, network: LocalNetwork, message: Message, group: Sequence[_Key], tensor: Tensor
    ) -> None:
        self._network = network
        self._message = message
        self._group = group
        self._tensor = tensor

    def wait(self) -> Tensor:
        if not all(self._network.await_receive(one) for one in self._group):
            raise TransferError(
                f"{describe(self._message)} to rank {self._message.target_rank} did not go through "
                f"within {self._network.timeout_s:g} s; that rank never posted the receive"
            )
        return self._tensor


class _Receive:
    def __init__(
        self, network: LocalNetwork, message: Message, group: Sequence[_Key], key: _Key
    ) -> None:
        self._network = network
        self._message = message
        self._group = group
        self._key = key

    def wait(self) -> Tensor:
        if not all(self._network.await_send(one) for one in self._group):
            raise TransferError(
                f"{describe(self._message)} from rank {self._message.source_rank} did not arrive "
                f"within {self._network.timeout_s:g} s; that rank never sent it"
            )
        return self._network.take(self._key)
