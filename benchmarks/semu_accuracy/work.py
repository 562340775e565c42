"""A chunk of real layers under a memory strategy: timed, weighed."""

import abc
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.runtime.activations import ActivationMeter
from megatron_pipeweaver.runtime.offload import HostOffload
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.probes import Clock

Size = tuple[int, int]
"""Sequence and batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward that is ready to run.

    `owned` are inputs that the chunk keeps, as its part of what a stage holds; `given` are held by
    others whether it keeps them or not.
    """

    run: Callable[[], torch.Tensor]
    owned: tuple[torch.Tensor, ...]
    given: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Bytes of one forward and backward: kept in between, and the most that there were at once."""

    held_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """One forward and one backward.

    `waited_ns` is how long the host waited for the device behind the last calls of both. Where it
    did not wait, the device waited for the host, and times are the framework's.
    """

    forward_ns: int
    backward_ns: int
    waited_ns: int

    @property
    def both_ns(self) -> int:
        """Forward plus backward."""
        return self.forward_ns + self.backward_ns


class Chunk(abc.ABC):
    """Real layers, at any size under any strategy.

    Attributes:
        name: what the tables call it.
        module: what SEMU is told of it.
        stage: which part of `module` it is.
        device: ``cpu`` (single precision) or ``cuda`` (bf16).
    """

    name: str
    module: ModuleSpec
    stage: StageShape

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    @abc.abstractmethod
    def load(self, size: Size) -> Load:
        """What SEMU is told of the work at `size`."""

    @abc.abstractmethod
    def parameters(self, size: Size) -> Iterator[torch.nn.Parameter]:
        """Those of all layers that work on `size`."""

    @abc.abstractmethod
    def made(self, size: Size, strategy: LayerStrategy, offload: HostOffload | None = None) -> Pass:
        """A forward at `size` under `strategy`, with inputs of its own."""

    def random(self, *shape: int) -> torch.Tensor:
        """Random values on the chunk's device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def times(self, size: Size, strategy: LayerStrategy, clock: Clock) -> Times:
        """Forward and backward, once."""
        offload = HostOffload(self._stream)
        ready = self.made(size, strategy, offload)
        start = clock.now_ns()
        output = ready.run()
        issued = time.perf_counter_ns()
        middle = clock.now_ns()
        waited = time.perf_counter_ns() - issued
        start_backward = _backward_of(output)
        del output
        again = clock.now_ns()
        offload.prefetch()
        start_backward()
        offload.finish()
        issued = time.perf_counter_ns()
        end = clock.now_ns()
        waited += time.perf_counter_ns() - issued
        return Times(forward_ns=middle - start, backward_ns=end - again, waited_ns=waited)

    def weigh(self, size: Size, strategy: LayerStrategy) -> Weight:
        """What is kept from the forward to the backward, and the peak of both."""
        _backward_of(self.made(size, LayerStrategy.KEEP).run())()  # weights have gradients now
        offload = HostOffload(self._stream)
        ready = self.made(size, strategy, offload)
        # Inputs were there before; an offloaded layer's waits on the host with the rest.
        own = sum(one.nbytes for one in ready.owned)
        sent = own if strategy is LayerStrategy.OFFLOAD and not self.stage.is_first else 0
        return self._weighed(ready, offload, size, own - sent)

    def _weighed(self, ready: Pass, offload: HostOffload, size: Size, own: int) -> Weight:
        if self.device == "cuda":
            allocator = CudaMemory()
            output = ready.run()
            held = allocator.held_bytes() - output.nbytes
            start_backward = _backward_of(output)
            del output
            offload.prefetch()
            start_backward()
            offload.finish()
            return Weight(held_bytes=held + own, peak_bytes=allocator.peak_bytes() + own)
        meter = ActivationMeter([*self.parameters(size), *ready.given])
        with TensorMemory() as memory, meter.recording():
            output = ready.run()
            held = meter.held_bytes
            start_backward = _backward_of(output)
            del output
            start_backward()
        return Weight(held_bytes=held, peak_bytes=memory.peak_bytes + own)


def _backward_of(output: torch.Tensor) -> Callable[[], None]:
    """The backward of `output`, whose memory is let go of, as Megatron does behind a send."""
    gradient = torch.ones_like(output)
    schedules.deallocate_output_tensor(output, True)
    return lambda: schedules.custom_backward(output, gradient)


class CudaMemory:
    """What CUDA's allocator gives out from now on."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def held_bytes(self) -> int:
        """At this moment."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - self._before

    def peak_bytes(self) -> int:
        """At most so far."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before


class TensorMemory(TorchDispatchMode):
    """What tensors that operators make hold at most, on a device whose allocator cannot be asked.

    Each storage counts from the operator that makes it until nobody refers to it any more, and not
    while it is emptied. What a kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {_address(one) for one in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for one in _tensors(made):
            if _address(one) not in before:
                storage = one.untyped_storage()
                self._live[storage._cdata] = weakref.ref(storage)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes())
        return made

    def held_bytes(self) -> int:
        """At this moment."""
        found = {address: reference() for address, reference in self._live.items()}
        self._live = {
            address: self._live[address] for address in found if found[address] is not None
        }
        return sum(one.nbytes() for one in found.values() if one is not None)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
