"""Pipeline ranks as threads of one process: the same transport without a network.

Rendezvous semantics, as strict as gloo's: a send's wait ends once the peer has posted the
receive, a receive's once the peer has posted the send.
"""

from __future__ import annotations

from threading import Condition

from torch import Tensor

from megatron_pipeweaver.errors import TransferError
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.runtime.transfer import Pending, describe

_Key = tuple[int, int, int]  # source rank, target rank, number


class LocalNetwork:
    """What the ranks' transports share; `timeout_s` bounds every wait."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.timeout_s = timeout_s
        self._changed = Condition()
        self._sent: dict[_Key, Tensor] = {}
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

    def take(self, key: _Key) -> Tensor | None:
        """The tensor sent as `key`, or `None` when it was not sent in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._sent, self.timeout_s):
                return None
            return self._sent.pop(key)


class LocalTransport:
    """One rank's end of a `LocalNetwork`, for one run of one plan."""

    def __init__(self, network: LocalNetwork) -> None:
        self._network = network

    def isend(self, message: Message, tensor: Tensor) -> Pending:
        """Post a copy of `tensor`."""
        self._network.post_send(_key(message), tensor.clone())
        return _Send(self._network, message, tensor)

    def irecv(self, message: Message) -> Pending:
        """Post the receive of `message`."""
        self._network.post_receive(_key(message))
        return _Receive(self._network, message)


def _key(message: Message) -> _Key:
    return message.source_rank, message.target_rank, message.sequence


class _Send:
    def __init__(self, network: LocalNetwork, message: Message, tensor: Tensor) -> None:
        self._network = network
        self._message = message
        self._tensor = tensor

    def wait(self) -> Tensor:
        if not self._network.await_receive(_key(self._message)):
            raise TransferError(
                f"{describe(self._message)} to rank {self._message.target_rank} did not go through "
                f"within {self._network.timeout_s:g} s; that rank never posted the receive"
            )
        return self._tensor


class _Receive:
    def __init__(self, network: LocalNetwork, message: Message) -> None:
        self._network = network
        self._message = message

    def wait(self) -> Tensor:
        tensor = self._network.take(_key(self._message))
        if tensor is None:
            raise TransferError(
                f"{describe(self._message)} from rank {self._message.source_rank} did not arrive "
                f"within {self._network.timeout_s:g} s; that rank never sent it"
            )
        return tensor
