"""Efficiency factors from micro-benchmarks: measure operators, fit, say how far off the fit is.

Only `measure` needs torch, and imports it itself. Times are medians of repeated runs; the fit
minimises relative errors, so small sizes count as much as large ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.attention import AttentionShape, attention
from megatron_pipeweaver.semu.cost import OperatorCosts
from megatron_pipeweaver.semu.devices import DeviceProfile, Factors
from megatron_pipeweaver.semu.operators import Sketch, activation, elementwise, linear, norm
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Phase

_SECOND_NS = 1_000_000_000
_PERMILLE = 1000
_SWEEPS = 2000
_LEAST_NS = 2_000_000
_BACKWARD = (Phase.INPUT_GRAD, Phase.WEIGHT_GRAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured operator: its forward, and its whole backward."""

    operator: Operator
    forward_ns: int
    backward_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A fitted profile and, by operator class, the mean relative error on held-out samples."""

    profile: DeviceProfile
    held_out_error: Mapping[OperatorClass, float]


def calibrate(samples: Sequence[Sample], profile: DeviceProfile) -> Calibration:
    """Fit the factors of every operator class in `samples`; every fourth sample is held out.

    Raises:
        ConfigError: a class has fewer than four samples.
    """
    factors = dict(profile.factors)
    errors: dict[OperatorClass, float] = {}
    for kind in dict.fromkeys(one.operator.kind for one in samples):
        mine = [one for one in samples if one.operator.kind is kind]
        if len(mine) < 4:
            raise ConfigError(f"calibration: {len(mine)} samples of {kind}; give at least 4")
        held_out = mine[3::4]
        seen = [one for index, one in enumerate(mine) if index % 4 != 3]
        factors[kind] = fit_factors(seen, profile)
        costs = OperatorCosts(replace(profile, factors=factors))
        errors[kind] = statistics.mean(relative_error(one, costs) for one in held_out)
    return Calibration(
        profile=replace(profile, factors=factors, source=f"{profile.source}; calibrated"),
        held_out_error=errors,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSample:
    """A chunk of `layers` layers: emulated, and measured in the framework that runs it."""

    layers: int
    emulated_forward_ns: int
    emulated_backward_ns: int
    forward_ns: int
    backward_ns: int


def with_layer_times(profile: DeviceProfile, samples: Sequence[LayerSample]) -> DeviceProfile:
    """`profile` with what real layers take on top of their operators, the median of `samples`.

    The emulated times must be those of `profile` itself.
    """
    forward = statistics.median(
        (one.forward_ns - one.emulated_forward_ns) / one.layers for one in samples
    )
    backward = statistics.median(
        (one.backward_ns - one.emulated_backward_ns) / one.layers for one in samples
    )
    return replace(
        profile,
        layer_forward_ns=max(0, profile.layer_forward_ns + round(forward)),
        layer_backward_ns=max(0, profile.layer_backward_ns + round(backward)),
    )


def relative_error(sample: Sample, costs: OperatorCosts) -> float:
    """How far forward plus backward are off, as a share of what was measured."""
    predicted = sum(costs.latency_ns(sample.operator, phase) for phase in Phase)
    measured = sample.forward_ns + sample.backward_ns
    return abs(predicted - measured) / max(1, measured)


def fit_factors(samples: Sequence[Sample], profile: DeviceProfile) -> Factors:
    """The factors of one operator class that fit `samples` best.

    An operator with matmul sizes is taken as bound by compute, any other by memory. The forward
    gives launch time and rate; the backward stretches its own work.
    """
    shaped = all(one.operator.forward.shape for one in samples)
    rows = [_terms(one, shaped=shaped) for one in samples]
    weights = non_negative_fit(rows, [one.forward_ns for one in samples])
    launch, per_unit = round(weights[0]), max(weights[1], 1e-9)
    found = Factors(overhead_ns=launch)
    if shaped:
        rate = _SECOND_NS / per_unit
        halves = tuple(round(weight / per_unit) for weight in weights[2:])
        found = replace(
            found,
            compute_permille=max(1, round(_PERMILLE * rate / profile.spec.flops)),
            # What the data sheet says of memory must not bound what was measured.
            memory_permille=_unbounding_memory(samples, profile),
            half_sizes=halves,
        )
    else:
        rate = _SECOND_NS / per_unit
        permille = max(1, round(_PERMILLE * rate / profile.spec.memory_bandwidth))
        found = replace(found, memory_permille=permille)
    return _with_backward(found, samples, profile)


def _terms(sample: Sample, *, shaped: bool) -> tuple[float, ...]:
    """Launches, work, and for matmuls the work that each size would have if it were one."""
    work = sample.operator.forward
    if not shaped:
        return float(work.kernels), float(work.memory_bytes)
    return (
        float(work.kernels),
        float(work.flops),
        *(work.flops / size for size in work.shape),
    )


def _unbounding_memory(samples: Sequence[Sample], profile: DeviceProfile) -> int:
    fastest = max(one.operator.forward.memory_bytes / one.forward_ns for one in samples)
    return max(
        _PERMILLE, round(2 * _PERMILLE * fastest * _SECOND_NS / profile.spec.memory_bandwidth)
    )


def _with_backward(factors: Factors, samples: Sequence[Sample], profile: DeviceProfile) -> Factors:
    """Stretch both gradients alike, so that the median backward fits."""
    costs = OperatorCosts(
        replace(profile, factors=dict.fromkeys((one.operator.kind for one in samples), factors))
    )
    ratios = [
        one.backward_ns / predicted
        for one in samples
        if (predicted := sum(costs.latency_ns(one.operator, phase) for phase in _BACKWARD))
        and one.backward_ns
    ]
    if not ratios:
        return factors
    stretch = max(1, round(_PERMILLE * statistics.median(ratios)))
    return replace(factors, input_grad_permille=stretch, weight_grad_permille=stretch)


def non_negative_fit(
    rows: Sequence[Sequence[float]], targets: Sequence[float]
) -> tuple[float, ...]:
    """Weights >= 0 that minimise the squared relative errors of ``rows @ weights``.

    Coordinate descent on columns brought to one scale; deterministic.
    """
    scaled = [[value / target for value in row] for row, target in zip(rows, targets, strict=True)]
    width = len(scaled[0])
    norms = [max(sum(row[j] * row[j] for row in scaled) ** 0.5, 1e-300) for j in range(width)]
    columns = [[row[j] / norms[j] for row in scaled] for j in range(width)]
    weights = [0.0] * width
    residual = [1.0] * len(scaled)
    for _ in range(_SWEEPS):
        for j, column in enumerate(columns):
            step = sum(a * b for a, b in zip(column, residual, strict=True))
            new = max(0.0, weights[j] + step)
            moved = new - weights[j]
            if moved:
                residual = [r - moved * c for r, c in zip(residual, column, strict=True)]
                weights[j] = new
    return tuple(weight / norm_ for weight, norm_ in zip(weights, norms, strict=True))


def operators_of(options: RunOptions, build: Callable[[Sketch], object]) -> Operator:
    """The last operator that `build` adds to a sketch."""
    sketch = Sketch("sample", options)
    build(sketch)
    return sketch.operators[-1]


_SIZES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "cpu": ((64, 128), (128, 256), (256, 256), (512, 256), (256, 512)),
    "cuda": ((1024, 1024), (2048, 2048), (4096, 2048), (2048, 4096), (8192, 4096)),
}


def sizes_for(device: str) -> tuple[tuple[int, int], ...]:
    """Rows and widths that `measure` takes on ``cpu`` or ``cuda`` unless it is given others."""
    return _SIZES[device]


def measure(
    device: str = "cpu",
    *,
    sizes: Iterable[tuple[int, int]] | None = None,
    repeats: int = 7,
) -> list[Sample]:
    """Measure linears, norms, activations, sums, and attentions of ``rows x width`` inputs.

    Args:
        device: ``cpu`` (single precision, dense attention) or ``cuda`` (bf16, fused attention).
        sizes: rows and widths; `sizes_for` the device by default.
        repeats: runs per operator, of which the median counts.

    On the CPU the calling process uses one thread meanwhile: one core is the device.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("calibration: this machine has no CUDA device; measure the cpu instead")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(torch, device, sizes_for(device) if sizes is None else sizes, repeats)
    finally:
        torch.set_num_threads(threads)


def _measure(
    torch: Any, device: str, sizes: Iterable[tuple[int, int]], repeats: int
) -> list[Sample]:
    options = RunOptions.unfused() if device == "cpu" else RunOptions()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    stopwatch = _Stopwatch(torch, device, dtype, repeats)
    samples: list[Sample] = []
    for rows, width in sizes:
        samples.extend(_linears(stopwatch, options, rows, width))
        samples.extend(_pointwise(stopwatch, options, rows, width))
        samples.extend(_attentions(stopwatch, options, rows, width))
    return samples


class _Stopwatch:
    """Times of a function and of its backward, in nanoseconds."""

    def __init__(self, torch: Any, device: str, dtype: Any, repeats: int) -> None:
        self.torch = torch
        self._device = device
        self._dtype = dtype
        self._repeats = repeats

    def tensor(self, *shape: int) -> Any:
        """Random values that want a gradient."""
        value = self.torch.randn(*shape, device=self._device, dtype=self._dtype)
        return value.requires_grad_(True)

    def sample(self, operator: Operator, function: Callable[[], Any]) -> Sample:
        """Median times of `function` and of the backward of its result.

        Short ones run several times between two looks at the clock.
        """
        gradient = self.torch.randn_like(function())
        start = self._now()
        function()
        loops = 1 + _LEAST_NS // max(1, self._now() - start)
        forwards, backwards = [], []
        for _ in range(self._repeats):
            start = self._now()
            outputs = [function() for _ in range(loops)]
            middle = self._now()
            for output in outputs:
                output.backward(gradient)
            forwards.append((middle - start) / loops)
            backwards.append((self._now() - middle) / loops)
        return Sample(
            operator=operator,
            forward_ns=max(1, round(statistics.median(forwards))),
            backward_ns=round(statistics.median(backwards)),
        )

    def _now(self) -> int:
        """On a CPU the processor time, which leaves out what other programs took."""
        if self._device == "cpu":
            return time.process_time_ns()
        self.torch.cuda.synchronize()
        return time.perf_counter_ns()


def _linears(stopwatch: _Stopwatch, options: RunOptions, rows: int, width: int) -> list[Sample]:
    functional = stopwatch.torch.nn.functional
    samples = []
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
                bias=True,
            )

        source, weight = stopwatch.tensor(rows, width_in), stopwatch.tensor(width_out, width_in)
        bias = stopwatch.tensor(width_out)
        samples.append(
            stopwatch.sample(
                operators_of(options, build),
                partial(functional.linear, source, weight, bias),
            )
        )
    return samples


def _pointwise(stopwatch: _Stopwatch, options: RunOptions, rows: int, width: int) -> list[Sample]:
    functional = stopwatch.torch.nn.functional
    wide = 4 * width
    narrow, broad = stopwatch.tensor(rows, width), stopwatch.tensor(rows, wide)
    other, gain, shift = (
        stopwatch.tensor(rows, width),
        stopwatch.tensor(width),
        stopwatch.tensor(width),
    )

    def build_norm(sketch: Sketch) -> str:
        return norm(sketch, "norm", sketch.tensor("x", rows * width), rows, width, rms=False)

    def build_gelu(sketch: Sketch) -> str:
        source = sketch.tensor("x", rows * wide)
        return activation(sketch, "gelu", source, rows * wide, gated=False)

    def build_sum(sketch: Sketch) -> str:
        both = (sketch.tensor("x", rows * width), sketch.tensor("y", rows * width))
        return elementwise(sketch, "sum", both, rows * width)

    return [
        stopwatch.sample(
            operators_of(options, build_norm),
            lambda: functional.layer_norm(narrow, (width,), gain, shift),
        ),
        stopwatch.sample(operators_of(options, build_gelu), lambda: functional.gelu(broad)),
        stopwatch.sample(operators_of(options, build_sum), lambda: narrow + other),
    ]


def _attentions(stopwatch: _Stopwatch, options: RunOptions, rows: int, width: int) -> list[Sample]:
    """Softmax and context of one sequence on the CPU; the whole fused attention elsewhere."""
    heads, head_size = max(1, width // 32), 32
    shape = AttentionShape(rows=rows, heads=heads, head_size=head_size, pairs=rows * rows)
    sketch = Sketch("sample", options)
    names = tuple(sketch.tensor(name, rows * width) for name in ("q", "k", "v"))
    attention(sketch, "attention", (names[0], names[1], names[2]), shape)
    query, key, value = (stopwatch.tensor(heads, rows, head_size) for _ in range(3))
    if options.attention is Attention.FLASH:
        fused = stopwatch.torch.nn.functional.scaled_dot_product_attention
        return [
            stopwatch.sample(
                sketch.operators[0], lambda: fused(query[None], key[None], value[None])[0]
            )
        ]
    weights = stopwatch.tensor(heads, rows, rows)
    mask = stopwatch.torch.ones(rows, rows, dtype=stopwatch.torch.bool).triu(1)
    softmax, context = sketch.operators[1:]
    return [
        stopwatch.sample(
            softmax,
            lambda: stopwatch.torch.softmax(weights.masked_fill(mask, -10000.0), dim=-1),
        ),
        stopwatch.sample(context, lambda: stopwatch.torch.bmm(weights, value)),
    ]
