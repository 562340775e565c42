"""How many bytes a rank really holds for backwards to come, now and at most.

`TensorGauge` accounts tensors, on any device and with a cost per saved tensor; `AllocatorGauge`
asks CUDA's allocator, at no cost, and sees the memory that ops work in as well.

Saved tensors are counted by storage, once each however often they are saved; parameters are not
activations and do not count. What a checkpointed region will recompute is not saved, and does not
count until its backward runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor


class ActivationMeter:
    """Counts what is saved for backwards while `recording`.

    Args:
        ignored: tensors that are held anyway, as a rule the model's parameters.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self._ignored = frozenset(_identity(one) for one in ignored)
        self._held: dict[int, tuple[int, Tensor]] = {}
        self._lock = Lock()  # autograd lets go of tensors from threads of its own
        self._peak_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes held at this moment; storages that were emptied for a while hold nothing."""
        with self._lock:
            return self._sum()

    @property
    def peak_bytes(self) -> int:
        """The most bytes held at any moment at which something was saved."""
        return self._peak_bytes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count what forwards inside save, until their backwards let it go."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Saved | Tensor:
        if _identity(tensor) in self._ignored or tensor.numel() == 0:
            return tensor
        return _Saved(self, tensor)

    def take(self, tensor: Tensor) -> None:
        """One more user of a tensor's storage."""
        identity = _identity(tensor)
        with self._lock:
            users, _ = self._held.get(identity, (0, tensor))
            self._held[identity] = (users + 1, tensor)
            if users == 0:
                self._peak_bytes = max(self._peak_bytes, self._sum())

    def release(self, tensor: Tensor) -> None:
        """One user less."""
        identity = _identity(tensor)
        with self._lock:
            users, held = self._held.pop(identity)
            if users > 1:
                self._held[identity] = (users - 1, held)

    def _sum(self) -> int:
        return sum(one.untyped_storage().nbytes() for _, one in self._held.values())


class MemoryGauge(Protocol):
    """Measures the peak of one rank in one iteration."""

    def recording(self) -> AbstractContextManager[None]:
        """Around every forward."""

    def note(self, others: Iterable[Tensor] = ()) -> None:
        """Behind every op; `others` are held besides what autograd holds."""

    @property
    def peak_bytes(self) -> int:
        """The most bytes held so far."""


class TensorGauge:
    """What is held between ops, tensor by tensor: what autograd saved, and what it is told of.

    Args:
        ignored: tensors that are held anyway, as a rule the model's parameters.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        self._meter = ActivationMeter(ignored)
        self._peak_bytes = 0

    def recording(self) -> AbstractContextManager[None]:
        """See `MemoryGauge`."""
        return self._meter.recording()

    def note(self, others: Iterable[Tensor] = ()) -> None:
        """See `MemoryGauge`."""
        storages = {_identity(one): one.untyped_storage().nbytes() for one in others}
        held = self._meter.held_bytes + sum(storages.values())
        self._peak_bytes = max(self._peak_bytes, held)

    @property
    def peak_bytes(self) -> int:
        """See `MemoryGauge`."""
        return self._peak_bytes


class AllocatorGauge:
    """What CUDA's allocator gives out from now on, beyond what it had given out before."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before_bytes = torch.cuda.memory_allocated()

    def recording(self) -> AbstractContextManager[None]:
        """See `MemoryGauge`; there is nothing to do."""
        return nullcontext()

    def note(self, others: Iterable[Tensor] = ()) -> None:
        """See `MemoryGauge`; there is nothing to do."""

    @property
    def peak_bytes(self) -> int:
        """See `MemoryGauge`."""
        return max(0, torch.cuda.max_memory_allocated() - self._before_bytes)


class _Saved:
    """A saved tensor; tells its meter when autograd drops it."""

    __slots__ = ("_meter", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself may own the graph that owns this
        self._meter = meter
        meter.take(self.tensor)

    def __del__(self) -> None:
        self._meter.release(self.tensor)


def _unpack(saved: _Saved | Tensor) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _identity(tensor: Tensor) -> int:
    """The storage itself: its address in memory changes where it is emptied and filled again."""
    return int(tensor.untyped_storage()._cdata)
