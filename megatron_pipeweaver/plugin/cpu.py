"""What lets megatron-core's CUDA calls work on a machine without a GPU.

megatron-core asks for "the current CUDA device" wherever it makes a tensor. Without a GPU that
device is the CPU here, streams and events do nothing, and CUDA's random state is the CPU's.

A script that trains on CPU must also set ``TORCHDYNAMO_DISABLE=1`` in the environment before it
imports torch: megatron-core decorates functions with ``torch.compile`` while it is imported, and
compiling them takes minutes on a CPU for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_pipeweaver.plugin.patching import Patch

_CPU = torch.device("cpu")

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
"""Functions of `torch` that make tensors and take a `device`."""


class CpuStream:
    """A CUDA stream on a machine without one: everything has happened when a call returns."""

    device = _CPU
    cuda_stream = 0
    stream_id = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes and ignores what `torch.cuda.Stream` takes."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has happened now."""
        event = event or CpuEvent()
        event.record(self)
        return event

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class CpuEvent:
    """A CUDA event on a machine without one; knows when it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes and ignores what `torch.cuda.Event` takes."""
        self._recorded_ns = 0

    def record(self, stream: Any = None) -> None:
        """Remember the time."""
        del stream
        self._recorded_ns = time.perf_counter_ns()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """The event has happened."""
        return True

    def elapsed_time(self, later: CpuEvent) -> float:
        """Milliseconds from this event to `later`, as `torch.cuda.Event` counts them."""
        return (later._recorded_ns - self._recorded_ns) / 1e6


def cpu_patches() -> list[Patch]:
    """The patches that a machine without a GPU needs; none where CUDA is available.

    Returns:
        Patches of `torch` and of megatron-core's random state tracker, not applied yet.
    """
    if torch.cuda.is_available():
        return []
    return [
        *(Patch(torch.cuda, name, value) for name, value in _cuda_functions().items()),
        *(Patch(torch.cuda.random, name, value) for name, value in _random_state().items()),
        *(Patch(torch, name, _on_cpu(getattr(torch, name))) for name in _FACTORIES),
        *(Patch(torch.Tensor, name, value) for name, value in _tensor_methods().items()),
        Patch(torch.nn.Module, "cuda", _unmoved),
        Patch(megatron_random, "_set_cuda_rng_state", _set_rng_state),
        Patch(megatron_random.CudaRNGStatesTracker, "fork", _fork),
        # Without Transformer Engine, 0.16.1 leaves out the `None` that its router asks for.
        Patch(
            moe_utils,
            "te_general_gemm",
            getattr(moe_utils, "te_general_gemm", None),
            may_be_absent=True,
        ),
        # Without it, 0.16.1 takes Transformer Engine's names for the real ones here.
        Patch(multi_latent_attention, "HAVE_TE", HAVE_TE),
        Patch(token_dispatcher, "maybe_move_tensor_to_cpu", _counts),
    ]


def _cuda_functions() -> Mapping[str, Any]:
    stream = CpuStream()
    return {
        "Stream": CpuStream,
        "Event": CpuEvent,
        "current_device": lambda: _CPU,
        "current_stream": lambda device=None: stream,
        "default_generators": (torch.default_generator,),
        "default_stream": lambda device=None: stream,
        "empty_cache": _nothing,
        "get_device_capability": lambda device=None: (8, 0),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": _nothing,
        "max_memory_allocated": _zero,
        "max_memory_reserved": _zero,
        "memory_allocated": _zero,
        "memory_reserved": _zero,
        "memory_stats": lambda device=None: defaultdict(int),
        "reset_peak_memory_stats": _nothing,
        "set_device": _nothing,
        "set_stream": _nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": _nothing,
        **_random_state(),
    }


def _random_state() -> Mapping[str, Any]:
    return {
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": _set_rng_state,
    }


def _tensor_methods() -> Mapping[str, Any]:
    to, type_of = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.dtype) and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(options.get("device")):
            options["device"] = _CPU
        return to(self, *args, **options)

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = type_of(self, *args, **options)
        # Megatron's optimizer and gradient clipping compare these names.
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    return {"cuda": _unmoved, "pin_memory": _unmoved, "to": to_cpu, "type": type_as_on_cuda}


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with the CPU for any CUDA device, whose memory is not pinned."""

    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> Any:
        if _is_cuda(options.get("device")):
            options["device"] = _CPU
        options.pop("pin_memory", None)
        return factory(*args, **options)

    return make


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
    """Without CUDA, torch would queue the new state for ever and never set it."""
    del device, graph_safe
    torch.set_rng_state(new_state)


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Megatron's tracked random states, kept apart from the surrounding one as on a GPU.

    Its own method takes a changed CPU state for a mistake; here the CPU's is the only state.
    """
    if name not in tracker.states_:
        raise KeyError(f"random state {name!r} is not there; call model_parallel_cuda_manual_seed")
    outer = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


def _counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron makes of counts on a GPU: an array, which `all_to_all_single` takes."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _unmoved(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _zero(*_: Any, **__: Any) -> int:
    return 0
