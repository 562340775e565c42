"""Saved tensors in host memory: out behind a layer's forward, back in front of its backward.

    compute | layer 0 | layer 1 | layer 2 |  ...  | layer 2 | layer 1 | layer 0 |
    copies            | 0 out   | 1 out   |     2 in | 1 in    | 0 in    |

On a device with streams the copies run on one of their own. Two layers at most are on the device at
a time: in the forward the one that runs and the one that leaves, in the backward the one that runs
and the one in front of it. The host queues work far ahead of the device, and memory that is marked
as used by a second stream (`Tensor.record_stream`) cannot be given out again until the device has
come by: every layer of a stage would find the memory of those before it taken. So all memory here
belongs to the compute stream, which waits for a copy before the memory behind it is let go.

On a CPU the same code copies from one buffer into another, which counts as host memory where
tensors are accounted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True, kw_only=True)
class _Copy:
    """One storage of a layer: on the host, and while its backward is near, on the device again."""

    host: Tensor
    device: torch.device
    leaving: Tensor | None = None
    """The storage itself, where there are streams, until the compute stream has waited for it."""
    left: Any = None
    """The event after which the copy to the host is complete."""
    back: Tensor | None = None
    arrived: Any = None
    """The event after which `back` is whole, until the compute stream has waited for it."""


@dataclass(slots=True, kw_only=True)
class _Layer:
    """What one layer saved, by storage; the weak references keep addresses from coming again."""

    copies: dict[int, _Copy] = field(default_factory=dict)
    storages: list[StorageWeakRef] = field(default_factory=list)
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class _View:
    """A saved tensor, as a view of a copied storage."""

    layer: int
    copy: _Copy
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class HostOffload:
    """What the offloaded layers of one stage pair saved, in host memory.

    Args:
        stream: where copies run; `None` on devices without streams.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream
        self._device_type = "cpu" if stream is None else str(stream.device.type)
        self._layers: list[_Layer] = []

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory at this moment."""
        return sum(copy.host.nbytes for layer in self._layers for copy in layer.copies.values())

    def back(self) -> Iterator[Tensor]:
        """What is back on the device at this moment."""
        for layer in self._layers:
            for copy in layer.copies.values():
                if copy.back is not None:
                    yield copy.back

    @contextmanager
    def saving(self, ignored: Iterable[Tensor]) -> Iterator[None]:
        """Send what forwards inside save to the host, but for `ignored`; one layer a call.

        What lies on another device than the copies run on, as scalars on the host do, stays there.
        """
        skipped = frozenset(_address(one) for one in ignored)
        number, layer = len(self._layers), _Layer()
        self._layers.append(layer)

        def pack(tensor: Tensor) -> _View | Tensor:
            elsewhere = tensor.device.type != self._device_type
            if elsewhere or tensor.numel() == 0 or _address(tensor) in skipped:
                return tensor
            return _View(
                number,
                self._copy_of(tensor, layer),
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                int(tensor.storage_offset()),
            )

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        layer.storages.clear()
        if number:
            self._let_leave(self._layers[number - 1])

    def settle(self) -> None:
        """The stage's forward has run: give the last layer's memory back once it has left.

        The compute stream does not wait for it; one layer a stage is what the allocator may hold.
        """
        for layer in self._layers[-1:]:
            for copy in layer.copies.values():
                if copy.leaving is not None:
                    copy.leaving.record_stream(self._stream)
                    copy.leaving = None

    def prefetch(self) -> None:
        """Start to bring the last layer back; the others follow one by one as backwards run."""
        if self._layers:
            self._bring_back(len(self._layers) - 1)

    def finish(self) -> None:
        """Let go of everything; the backward has run."""
        for layer in self._layers:
            self._let_go(layer)
        self._layers.clear()

    def _copy_of(self, tensor: Tensor, layer: _Layer) -> _Copy:
        """The host copy of `tensor`'s storage, made once however often it is saved."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        found = layer.copies.get(reference.cdata)
        if found is None:
            layer.storages.append(reference)
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            found = layer.copies[reference.cdata] = self._send_out(whole)
        return found

    def _send_out(self, whole: Tensor) -> _Copy:
        host = torch.empty_like(whole, device="cpu", pin_memory=self._stream is not None)
        made = _Copy(host=host, device=whole.device)
        with self._copying():
            host.copy_(whole, non_blocking=True)
        if self._stream is not None:
            made.leaving, made.left = whole, self._stream.record_event()
        return made

    def _bring_back(self, number: int) -> None:
        """Start the copies of a layer back to the device, where that has not been done."""
        layer = self._layers[number]
        if layer.wanted:
            return
        layer.wanted = True
        self._let_leave(layer)  # where nobody has settled
        for copy in layer.copies.values():
            # The compute stream's memory: the copy waits for whatever has used it so far.
            copy.back = torch.empty_like(copy.host, device=copy.device)
            with self._copying():
                if copy.left is not None:
                    self._stream.wait_event(copy.left)
                copy.back.copy_(copy.host, non_blocking=True)
            if self._stream is not None:
                copy.arrived = self._stream.record_event()

    def _unpack(self, saved: _View | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._work_on(saved.layer)
        copy = saved.copy
        assert copy.back is not None
        self._await(copy)
        whole = torch.empty(0, dtype=saved.dtype, device=copy.device)
        return whole.set_(copy.back.untyped_storage(), saved.offset, saved.shape, saved.strides)

    def _work_on(self, number: int) -> None:
        """The backward of a layer begins: bring back the one in front, let go of those behind."""
        self._bring_back(number)
        if number > 0:
            self._bring_back(number - 1)
        for layer in self._layers[number + 1 :]:
            self._let_go(layer)

    def _let_leave(self, layer: _Layer) -> None:
        """The compute stream waits until `layer` is on the host; then its memory is free."""
        for copy in layer.copies.values():
            if copy.leaving is not None:
                torch.cuda.current_stream(copy.device).wait_event(copy.left)
                copy.leaving = None

    def _let_go(self, layer: _Layer) -> None:
        """Free what `layer` has on the device and on the host."""
        for copy in layer.copies.values():
            self._await(copy)  # else what comes next in this memory could be copied over
        self._let_leave(layer)
        layer.copies.clear()

    def _await(self, copy: _Copy) -> None:
        """The compute stream waits until `copy` is back, once."""
        if copy.arrived is not None:
            torch.cuda.current_stream(copy.device).wait_event(copy.arrived)
            copy.arrived = None

    def _copying(self) -> AbstractContextManager[Any]:
        """On the copy stream, behind what the compute stream has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream


def copy_stream() -> Any:
    """A stream for copies on the current device; `None` where devices have none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
