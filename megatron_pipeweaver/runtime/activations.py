"""How many bytes autograd really holds for backwards to come, now and at most.

Saved tensors are counted by storage, once each however often they are saved; parameters are not
activations and do not count. What a checkpointed region will recompute is not saved, and does not
count until its backward runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor


class ActivationMeter:
    """Counts what is saved for backwards while `recording`.

    Args:
        ignored: tensors that are held anyway, as a rule the model's parameters.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self._ignored = frozenset(_storage(one) for one in ignored)
        self._users: dict[int, int] = {}
        self._lock = Lock()  # autograd lets go of tensors from threads of its own
        self._held_bytes = 0
        self._peak_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes held at this moment."""
        return self._held_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes held at any moment so far."""
        return self._peak_bytes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count what forwards inside save, until their backwards let it go."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Saved | Tensor:
        if _storage(tensor) in self._ignored or tensor.numel() == 0:
            return tensor
        return _Saved(self, tensor)

    def take(self, storage: int, size_bytes: int) -> None:
        """One more user of a storage."""
        with self._lock:
            users = self._users.get(storage, 0)
            self._users[storage] = users + 1
            if users == 0:
                self._held_bytes += size_bytes
                self._peak_bytes = max(self._peak_bytes, self._held_bytes)

    def release(self, storage: int, size_bytes: int) -> None:
        """One user less."""
        with self._lock:
            self._users[storage] -= 1
            if self._users[storage] == 0:
                del self._users[storage]
                self._held_bytes -= size_bytes


class _Saved:
    """A saved tensor; tells its meter when autograd drops it."""

    __slots__ = ("_meter", "_size_bytes", "_storage", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself may own the graph that owns this
        self._meter = meter
        self._storage = _storage(tensor)
        self._size_bytes = tensor.untyped_storage().nbytes()
        meter.take(self._storage, self._size_bytes)

    def __del__(self) -> None:
        self._meter.release(self._storage, self._size_bytes)


def _unpack(saved: _Saved | Tensor) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
