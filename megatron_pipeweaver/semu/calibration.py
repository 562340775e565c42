"""Efficiency factors from measured operators (`semu.probes`): fit, and say how far off it is.

Forward, input gradient and weight gradient are fitted apart. The fit minimises relative errors, so
small sizes count as much as large ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.cost import OperatorCosts
from megatron_pipeweaver.semu.devices import DeviceProfile, Factors
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Phase, Work

_SECOND_NS = 1_000_000_000
_PERMILLE = 1000
_SWEEPS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured operator: nanoseconds by phase, 0 where it has no such phase."""

    operator: Operator
    times_ns: Mapping[Phase, int]


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
    """`profile` with what real layers take beyond their operators, fitted to `samples`.

    ``measured = permille / 1000 * emulated + layers * ns``, forward and backward apart: operators
    in a layer find other caches than alone, and the framework works between them. The emulated
    times must be those of a `profile` that has no such factors yet.

    Raises:
        ConfigError: there are fewer than two samples, or `profile` has such factors.
    """
    plain = replace(
        profile,
        layer_forward_ns=0,
        layer_backward_ns=0,
        layer_forward_permille=_PERMILLE,
        layer_backward_permille=_PERMILLE,
    )
    if len(samples) < 2 or plain != profile:
        raise ConfigError(
            f"calibration of layers: {len(samples)} samples on {profile.spec.name!r}; give at "
            "least 2, emulated with a profile that has no layer factors"
        )
    forward = non_negative_fit(
        [(one.emulated_forward_ns, one.layers) for one in samples],
        [one.forward_ns for one in samples],
    )
    backward = non_negative_fit(
        [(one.emulated_backward_ns, one.layers) for one in samples],
        [one.backward_ns for one in samples],
    )
    return replace(
        profile,
        layer_forward_permille=max(1, round(_PERMILLE * forward[0])),
        layer_forward_ns=round(forward[1]),
        layer_backward_permille=max(1, round(_PERMILLE * backward[0])),
        layer_backward_ns=round(backward[1]),
    )


def relative_error(sample: Sample, costs: OperatorCosts) -> float:
    """How far all phases together are off, as a share of what was measured."""
    predicted = sum(costs.latency_ns(sample.operator, phase) for phase in Phase)
    measured = sum(sample.times_ns.values())
    return abs(predicted - measured) / max(1, measured)


def fit_factors(samples: Sequence[Sample], profile: DeviceProfile) -> Factors:
    """The factors of one operator class that fit `samples` best, each phase with its own.

    An operator that sends is taken as bound by the link within a node, one with matmul sizes by
    compute, any other by memory.
    """
    phases = {}
    for phase in Phase:
        rows = [
            (work, time_ns)
            for one in samples
            if (work := one.operator.work(phase)) != NO_WORK
            and (time_ns := one.times_ns.get(phase, 0))
        ]
        phases[phase] = _fit_phase(rows, profile) if rows else None
    forward = phases[Phase.FORWARD]
    if forward is None:
        raise ConfigError("calibration: no forward was measured; measure one")
    return replace(
        forward, input_grad=phases[Phase.INPUT_GRAD], weight_grad=phases[Phase.WEIGHT_GRAD]
    )


def _fit_phase(rows: Sequence[tuple[Work, int]], profile: DeviceProfile) -> Factors:
    if all(work.steps for work, _ in rows):
        return _fit_network(rows, profile)
    shaped = all(work.shape for work, _ in rows)
    weights = non_negative_fit(
        [_terms(work, shaped=shaped) for work, _ in rows], [time_ns for _, time_ns in rows]
    )
    launch, per_unit = round(weights[0]), max(weights[1], 1e-9)
    rate = _SECOND_NS / per_unit
    if not shaped:
        permille = round(_PERMILLE * rate / profile.spec.memory_bandwidth)
        return Factors(overhead_ns=launch, memory_permille=max(1, permille))
    return Factors(
        overhead_ns=launch,
        compute_permille=max(1, round(_PERMILLE * rate / profile.spec.flops)),
        # What the data sheet says of memory must not bound what was measured.
        memory_permille=_unbounding_memory(rows, profile),
        half_sizes=tuple(round(weight / per_unit) for weight in weights[2:]),
    )


def _fit_network(rows: Sequence[tuple[Work, int]], profile: DeviceProfile) -> Factors:
    """Start and bandwidth; what the data sheet says of a message's latency is taken as given."""
    latency_ns = profile.spec.link_latency_ns
    left = [max(1, time_ns - work.steps * latency_ns) for work, time_ns in rows]
    weights = non_negative_fit(
        [(float(work.kernels), float(work.network_bytes)) for work, _ in rows], left
    )
    rate = _SECOND_NS / max(weights[1], 1e-9)
    return Factors(
        overhead_ns=round(weights[0]),
        network_permille=max(1, round(_PERMILLE * rate / profile.spec.scale_up_bandwidth)),
        memory_permille=_unbounding_memory(rows, profile),
    )


def _terms(work: Work, *, shaped: bool) -> tuple[float, ...]:
    """Launches, work, and for matmuls the work that each size would have if it were one."""
    if not shaped:
        return float(work.kernels), float(work.memory_bytes)
    return (
        float(work.kernels),
        float(work.flops),
        *(work.flops / size for size in work.shape),
    )


def _unbounding_memory(rows: Sequence[tuple[Work, int]], profile: DeviceProfile) -> int:
    fastest = max(work.memory_bytes / time_ns for work, time_ns in rows)
    return max(
        _PERMILLE, round(2 * _PERMILLE * fastest * _SECOND_NS / profile.spec.memory_bandwidth)
    )


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
