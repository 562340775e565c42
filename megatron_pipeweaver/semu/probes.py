"""Micro-benchmarks: single operators, each as SEMU counts it and as torch runs it.

Probes are timed in rounds, one after another, so that a machine that drifts does so for all of
them alike; the median over rounds counts. Only functions that measure need torch, and import it
themselves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.attention import AttentionShape, attention
from megatron_pipeweaver.semu.calibration import Sample
from megatron_pipeweaver.semu.operators import (
    INDEX_BYTES,
    Sketch,
    activation,
    elementwise,
    embedding,
    host_copy,
    linear,
    norm,
)
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.work import Operator, Phase

_LEAST_NS = {"cpu": 300_000, "cuda": 3_000_000}
"""Shorter operators run several times between two looks at the clock, which waits for a GPU."""
_TABLE = 8
_HEAD_SIZES = {"cpu": 32, "cuda": 128}

_SIZES: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "cpu": (
            *((64, 128), (64, 256), (128, 256), (192, 192), (256, 256)),
            *((128, 512), (384, 256), (256, 384), (256, 512), (512, 256)),
        ),
        "cuda": (
            *((1024, 1024), (1024, 2048), (2048, 2048), (3072, 2048), (2048, 3072)),
            *((4096, 2048), (3072, 3072), (2048, 4096), (4096, 4096), (8192, 4096)),
        ),
    }
)


def sizes_for(device: str) -> tuple[tuple[int, int], ...]:
    """Rows and widths that `measure` takes on ``cpu`` or ``cuda`` unless it is given others."""
    return _SIZES[device]


class Clock:
    """Nanoseconds: processor time of this process on a CPU, which leaves out other programs'.

    On a GPU, wall-clock time behind a synchronisation.
    """

    __slots__ = ("_synchronize",)

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize

    def now_ns(self) -> int:
        """The time."""
        if self._synchronize is None:
            return time.process_time_ns()
        self._synchronize()
        return time.perf_counter_ns()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One operator; `run` makes its output from `inputs` and `parameters` that want gradients.

    Without `inputs` it has no input gradient, without `parameters` no weight gradient.
    """

    operator: Operator
    run: Callable[[], Any]
    inputs: tuple[Any, ...]
    parameters: tuple[Any, ...] = ()


@dataclass(slots=True)
class _Times:
    """Nanoseconds of one call, by phase, one entry per round."""

    loops: int
    gradient: Any
    phases: dict[Phase, list[float]]


def measure(
    device: str = "cpu",
    *,
    sizes: Iterable[tuple[int, int]] | None = None,
    repeats: int = 7,
) -> list[Sample]:
    """Measure linears, norms, activations, products, attentions, lookups and copies.

    Args:
        device: ``cpu`` (single precision, dense attention) or ``cuda`` (bf16, fused attention).
        sizes: rows and widths; `sizes_for` the device by default.
        repeats: rounds, of which the median counts.

    On the CPU the calling process uses one thread meanwhile: one core is the device.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = ProbeRounds(device, sizes_for(device) if sizes is None else sizes)
        for _ in range(repeats):
            rounds.run()
        return rounds.samples()
    finally:
        torch.set_num_threads(threads)


class ProbeRounds:
    """Probes of all operators at some sizes, timed once a round; `samples` are the medians.

    Operators run as `options` say: fused on a GPU, as Megatron's own on a CPU, by default.

    Raises:
        ConfigError: there is no such device here.
    """

    def __init__(
        self,
        device: str,
        sizes: Iterable[tuple[int, int]],
        *,
        options: RunOptions | None = None,
    ) -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "calibration: this machine has no CUDA device; measure the cpu instead"
            )
        self._torch = torch
        self._device = device
        self.clock = Clock(torch.cuda.synchronize if device == "cuda" else None)
        maker = _Maker(torch, device, options or _usual_options(device))
        self._probes = [probe for rows, width in sizes for probe in _probes(maker, rows, width)]
        self._times = [self._prepared(probe) for probe in self._probes]

    def __len__(self) -> int:
        return len(self._probes)

    def _prepared(self, probe: Probe) -> _Times:
        """Warmed up, with as many loops as the clock needs."""
        output = probe.run()
        gradient = self._torch.randn_like(output)
        if output.requires_grad:
            self._torch.autograd.backward(output, gradient)
        start = self.clock.now_ns()
        probe.run()
        loops = 1 + _LEAST_NS[self._device] // max(1, self.clock.now_ns() - start)
        return _Times(loops=loops, gradient=gradient, phases={phase: [] for phase in Phase})

    def run(self) -> None:
        """One round over all probes."""
        for index in range(len(self)):
            self.run_one(index)

    def run_one(self, index: int) -> None:
        """Time one probe: forwards, input gradients, weight gradients, each in one go.

        Weight gradients are added to those of the step before, as in training.
        """
        probe, times = self._probes[index], self._times[index]
        backward = self._torch.autograd.backward
        marks = [self.clock.now_ns()]
        outputs = [probe.run() for _ in range(times.loops)]
        marks.append(self.clock.now_ns())
        for output in outputs if probe.inputs else ():
            self._torch.autograd.grad(output, probe.inputs, times.gradient, retain_graph=True)
        marks.append(self.clock.now_ns())
        if probe.parameters:
            for output in outputs:
                backward(output, times.gradient, retain_graph=True, inputs=probe.parameters)
        marks.append(self.clock.now_ns())
        for phase, start, end in zip(Phase, marks, marks[1:], strict=False):
            times.phases[phase].append((end - start) / times.loops)

    def samples(self) -> list[Sample]:
        """The median of every phase of every probe."""
        found = []
        for probe, times in zip(self._probes, self._times, strict=True):
            medians = {
                phase: max(1, round(statistics.median(entries)))
                for phase, entries in times.phases.items()
            }
            if not probe.inputs:
                medians[Phase.INPUT_GRAD] = 0
            if not probe.parameters:
                medians[Phase.WEIGHT_GRAD] = 0
            found.append(Sample(operator=probe.operator, times_ns=medians))
        return found


def last_operator(options: RunOptions, build: Callable[[Sketch], object]) -> Operator:
    """The last operator that `build` adds to a sketch."""
    sketch = Sketch("sample", options)
    build(sketch)
    return sketch.operators[-1]


class _Maker:
    """Random tensors of one device and type, and the options that operators are counted with."""

    def __init__(self, torch: Any, device: str, options: RunOptions) -> None:
        self.torch = torch
        self.functional = torch.nn.functional
        self.options = options
        self.head_size = _HEAD_SIZES[device]
        self._device = device
        self._dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def tensor(self, *shape: int) -> Any:
        """Random values that want a gradient."""
        value = self.torch.randn(*shape, device=self._device, dtype=self._dtype)
        return value.requires_grad_(True)


def _usual_options(device: str) -> RunOptions:
    return RunOptions.unfused() if device == "cpu" else RunOptions()


def _probes(maker: _Maker, rows: int, width: int) -> Sequence[Probe]:
    return [
        *_linears(maker, rows, width),
        *_norms(maker, rows, width),
        *_activations(maker, rows, width),
        *_products(maker, rows, width),
        *_attentions(maker, rows, width),
        *_copies(maker, rows, width),
        *_embeddings(maker, rows, width),
    ]


def _linears(maker: _Maker, rows: int, width: int) -> list[Probe]:
    probes = []
    for width_in, width_out in ((width, width), (width, 4 * width), (4 * width, width)):

        def build(sketch: Sketch, sizes: tuple[int, int] = (width_in, width_out)) -> str:
            source = sketch.tensor("x", rows * sizes[0])
            return linear(
                sketch,
                "linear",
                source,
                rows=rows,
                width_in=sizes[0],
                width_out=sizes[1],
                bias=False,
            )

        source, weight = maker.tensor(rows, width_in), maker.tensor(width_out, width_in)
        probes.append(
            Probe(
                operator=last_operator(maker.options, build),
                run=partial(maker.functional.linear, source, weight),
                inputs=(source,),
                parameters=(weight,),
            )
        )
    return probes


def _norms(maker: _Maker, rows: int, width: int) -> list[Probe]:
    """Layer norm and RMS norm."""
    source, gain, shift = maker.tensor(rows, width), maker.tensor(width), maker.tensor(width)
    runs: list[tuple[bool, Callable[[], Any], tuple[Any, ...]]] = [
        (
            False,
            lambda: maker.functional.layer_norm(source, (width,), gain, shift),
            (gain, shift),
        ),
        (True, lambda: maker.functional.rms_norm(source, (width,), gain, 1e-6), (gain,)),
    ]

    def build(sketch: Sketch, rms: bool) -> str:
        return norm(sketch, "norm", sketch.tensor("x", rows * width), rows, width, rms=rms)

    return [
        Probe(
            operator=last_operator(maker.options, partial(build, rms=rms)),
            run=run,
            inputs=(source,),
            parameters=parameters,
        )
        for rms, run, parameters in runs
    ]


def _activations(maker: _Maker, rows: int, width: int) -> list[Probe]:
    """GELU and SwiGLU of an MLP four times as wide."""
    wide = 4 * width
    broad, double = maker.tensor(rows, wide), maker.tensor(rows, 2 * wide)

    def swiglu() -> Any:
        gate, up = double.chunk(2, dim=-1)
        return maker.functional.silu(gate) * (up + 0.0)

    def build(sketch: Sketch, gated: bool) -> str:
        source = sketch.tensor("x", rows * wide * (2 if gated else 1))
        return activation(sketch, "activation", source, rows * wide, gated=gated)

    return [
        Probe(
            operator=last_operator(maker.options, partial(build, gated=False)),
            run=lambda: maker.functional.gelu(broad),
            inputs=(broad,),
        ),
        Probe(
            operator=last_operator(maker.options, partial(build, gated=True)),
            run=swiglu,
            inputs=(double,),
        ),
    ]


_PRODUCT = ((3, 1), (6, 2))
"""Passes and kernels of a product, forward and backward; a sum has no backward of its own."""


def _products(maker: _Maker, rows: int, width: int) -> list[Probe]:
    one, other = maker.tensor(rows, width), maker.tensor(rows, width)

    def build(sketch: Sketch) -> str:
        both = (sketch.tensor("x", rows * width), sketch.tensor("y", rows * width))
        return elementwise(sketch, "product", both, rows * width, saves=both, apart=_PRODUCT)

    return [
        Probe(
            operator=last_operator(maker.options, build),
            run=lambda: one * other,
            inputs=(one, other),
        )
    ]


def _copies(maker: _Maker, rows: int, width: int) -> list[Probe]:
    """To the host, into pinned memory where there is a GPU; there and back take as long."""
    source = maker.tensor(rows, 4 * width).detach()
    host = maker.torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
    return [
        Probe(
            operator=host_copy(source.nbytes),
            run=lambda: host.copy_(source, non_blocking=True),
            inputs=(),
        )
    ]


def _embeddings(maker: _Maker, rows: int, width: int) -> list[Probe]:
    """Rows looked up in a table of eight times as many."""
    table = maker.tensor(_TABLE * rows, width)
    tokens = maker.torch.randint(_TABLE * rows, (rows,), device=table.device)

    def build(sketch: Sketch) -> str:
        weight = sketch.tensor("table", _TABLE * rows * width, parameter=True)
        source = sketch.tensor("tokens", rows, INDEX_BYTES)
        return embedding(sketch, source, weight, rows=rows, width=width)

    return [
        Probe(
            operator=last_operator(maker.options, build),
            run=lambda: maker.functional.embedding(tokens, table),
            inputs=(),
            parameters=(table,),
        )
    ]


def _attentions(maker: _Maker, rows: int, width: int) -> list[Probe]:
    """Scores, softmax and context of one sequence as Megatron's own; or the whole, fused."""
    size = maker.head_size
    heads = max(1, width // size)
    shape = AttentionShape(
        rows=rows, heads=heads, head_size=size, value_size=size, pairs=rows * rows
    )
    sketch = Sketch("sample", maker.options)
    names = tuple(sketch.tensor(name, rows * heads * size) for name in ("q", "k", "v"))
    attention(sketch, "attention", (names[0], names[1], names[2]), shape)
    if maker.options.attention is Attention.FLASH:
        query, key, value = (maker.tensor(1, heads, rows, size) for _ in range(3))
        fused = maker.functional.scaled_dot_product_attention
        return [
            Probe(
                operator=sketch.operators[0],
                run=lambda: fused(query, key, value, is_causal=False),
                inputs=(query, key, value),
            )
        ]
    return _dense_attentions(maker, tuple(sketch.operators), rows, heads)


def _dense_attentions(
    maker: _Maker, operators: tuple[Operator, ...], rows: int, heads: int
) -> list[Probe]:
    torch = maker.torch
    filled = operators[1]
    copied = 2 * maker.options.element_bytes * heads * rows * rows
    cloning = replace(
        filled.forward,
        memory_bytes=filled.forward.memory_bytes + copied,
        kernels=filled.forward.kernels + 1,
    )
    operators = (operators[0], replace(filled, forward=cloning), operators[2])
    # As in Megatron, heads of one row stand side by side.
    query, key, value = (maker.tensor(rows, heads, maker.head_size) for _ in range(3))
    weights = maker.tensor(heads, rows, rows)
    mask = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    buffer = torch.empty_like(weights, requires_grad=False)

    def scores() -> Any:
        turned = key.transpose(0, 1).transpose(1, 2)
        return torch.baddbmm(buffer, query.transpose(0, 1), turned, beta=0.0, alpha=0.2)

    def softmax() -> Any:
        # Filled in where they stand, through a view, as in Megatron.
        scores = weights.clone()
        view = scores.view(1, heads, rows, rows).masked_fill_(mask, -10000.0)
        return torch.softmax(view, dim=-1)

    def context() -> Any:
        return torch.bmm(weights, value.transpose(0, 1)).transpose(0, 1).contiguous()

    return [
        Probe(operator=operator, run=run, inputs=inputs)
        for operator, run, inputs in zip(
            operators,
            (scores, softmax, context),
            ((query, key), (weights,), (weights, value)),
            strict=True,
        )
    ]
