"""Efficiency factors from measured operators (`semu.probes`): fit, and say how far off it is.

Forward, input gradient and weight gradient are fitted apart. The fit is by relative errors, so
small sizes count as much as large ones, and robust, so that disturbed samples hardly count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.cost import OperatorCosts
from megatron_pipeweaver.semu.devices import DeviceProfile, Factors
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Phase, Queue, Work

_SECOND_NS = 1_000_000_000
_PERMILLE = 1000
_SWEEPS = 2000
_REWEIGHTINGS = 12
_SQUARED_UP_TO = 0.05
"""Relative errors beyond this count by their size, not by its square."""


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
    profile = _latency_bounded(samples, profile)
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
    """Layers that launch so many kernels: emulated, and measured in the framework."""

    forward_kernels: int
    backward_kernels: int
    emulated_forward_ns: int
    emulated_backward_ns: int
    forward_ns: int
    backward_ns: int


def with_layer_times(profile: DeviceProfile, samples: Sequence[LayerSample]) -> DeviceProfile:
    """`profile` with what real layers take beyond their operators, fitted to `samples`.

    ``measured = permille / 1000 * emulated + kernels * ns``, forward and backward apart: operators
    in a layer find other caches than alone, and the framework works between them, the longer the
    more of them there are. The emulated times must be those of a `profile` without such factors.

    Raises:
        ConfigError: there are fewer than two samples, or `profile` has such factors.
    """
    plain = replace(
        profile,
        layer_forward_ns=0,
        layer_backward_ns=0,
        layer_forward_permille=_PERMILLE,
        layer_backward_permille=_PERMILLE,
        kernel_forward_ns=0,
        kernel_backward_ns=0,
    )
    if len(samples) < 2 or plain != profile:
        raise ConfigError(
            f"calibration of layers: {len(samples)} samples on {profile.spec.name!r}; give at "
            "least 2, emulated with a profile that has no layer factors"
        )
    forward = non_negative_fit(
        [(one.emulated_forward_ns, one.forward_kernels) for one in samples],
        [one.forward_ns for one in samples],
    )
    backward = non_negative_fit(
        [(one.emulated_backward_ns, one.backward_kernels) for one in samples],
        [one.backward_ns for one in samples],
    )
    return replace(
        profile,
        layer_forward_permille=max(1, round(_PERMILLE * forward[0])),
        kernel_forward_ns=round(forward[1]),
        layer_backward_permille=max(1, round(_PERMILLE * backward[0])),
        kernel_backward_ns=round(backward[1]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSample:
    """A chunk in which `checkpoints` parts run again: emulated, and measured."""

    checkpoints: int
    emulated_forward_ns: int
    emulated_backward_ns: int
    forward_ns: int
    backward_ns: int


def with_checkpoint_times(
    profile: DeviceProfile, samples: Sequence[CheckpointSample]
) -> DeviceProfile:
    """`profile` with what running something again costs beyond what runs.

    The median over `samples`, which are emulated with this `profile`, of what each checkpoint took
    longer; never below 0.

    Raises:
        ConfigError: there is no sample, or one has no checkpoint.
    """
    if not samples or min(one.checkpoints for one in samples) < 1:
        raise ConfigError("calibration of checkpoints: give samples in which something runs again")
    forward, backward = (
        statistics.median((measured - emulated) / count for measured, emulated, count in pairs)
        for pairs in (
            [(one.forward_ns, one.emulated_forward_ns, one.checkpoints) for one in samples],
            [(one.backward_ns, one.emulated_backward_ns, one.checkpoints) for one in samples],
        )
    )
    return replace(
        profile,
        checkpoint_forward_ns=profile.checkpoint_forward_ns + max(0, round(forward)),
        checkpoint_backward_ns=profile.checkpoint_backward_ns + max(0, round(backward)),
    )


def relative_error(sample: Sample, costs: OperatorCosts) -> float:
    """How far all phases together are off, as a share of what was measured."""
    predicted = sum(costs.latency_ns(sample.operator, phase) for phase in Phase)
    measured = sum(sample.times_ns.values())
    return abs(predicted - measured) / max(1, measured)


def fit_factors(samples: Sequence[Sample], profile: DeviceProfile) -> Factors:
    """The factors of one operator class that fit `samples` best, each phase with its own.

    An operator that sends is taken as bound by the link within a node, a copy to the host by that
    link, one with matmul sizes by compute, any other by memory.
    """
    to_host = all(one.operator.queue is Queue.HOST_LINK for one in samples)
    phases = {}
    for phase in Phase:
        rows = [
            (work, time_ns)
            for one in samples
            if (work := one.operator.work(phase)) != NO_WORK
            and (time_ns := one.times_ns.get(phase, 0))
        ]
        phases[phase] = _fit_phase(rows, profile, to_host=to_host) if rows else None
    forward = phases[Phase.FORWARD]
    if forward is None:
        raise ConfigError("calibration: no forward was measured; measure one")
    return replace(
        forward, input_grad=phases[Phase.INPUT_GRAD], weight_grad=phases[Phase.WEIGHT_GRAD]
    )


def _fit_phase(
    rows: Sequence[tuple[Work, int]], profile: DeviceProfile, *, to_host: bool
) -> Factors:
    spec = profile.spec
    if to_host:
        return _fit_network(rows, profile, spec.host_bandwidth, latency_ns=0)
    if all(work.steps for work, _ in rows):
        return _fit_network(rows, profile, spec.scale_up_bandwidth, spec.link_latency_ns)
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


def _latency_bounded(samples: Sequence[Sample], profile: DeviceProfile) -> DeviceProfile:
    """`profile` with no more latency a message than the fastest measured one took."""
    fastest = [
        time_ns // work.steps
        for one in samples
        if (work := one.operator.forward).steps
        and one.operator.queue is not Queue.HOST_LINK
        and (time_ns := one.times_ns.get(Phase.FORWARD, 0))
    ]
    latency_ns = min([profile.spec.link_latency_ns, *fastest])
    return replace(profile, spec=replace(profile.spec, link_latency_ns=latency_ns))


def _fit_network(
    rows: Sequence[tuple[Work, int]], profile: DeviceProfile, bandwidth: int, latency_ns: int
) -> Factors:
    """Start and share of `bandwidth`; the latency of a message is taken as given."""
    weights = non_negative_fit(
        [(float(work.kernels), float(work.network_bytes)) for work, _ in rows],
        [time_ns for _, time_ns in rows],
        known=[work.steps * latency_ns for work, _ in rows],
    )
    rate = _SECOND_NS / max(weights[1], 1e-9)
    return Factors(
        overhead_ns=round(weights[0]),
        network_permille=max(1, round(_PERMILLE * rate / bandwidth)),
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
    rows: Sequence[Sequence[float]], targets: Sequence[float], known: Sequence[float] = ()
) -> tuple[float, ...]:
    """Weights >= 0 that fit ``rows @ weights + known`` to `targets` by relative errors, robustly.

    Errors count by their squares up to a few per cent and by their size beyond (Huber 1964), so
    that a sample which the machine disturbed does not bend the fit: least squares over and over,
    with less weight for rows that were far off. Deterministic.
    """
    known = known or [0.0] * len(targets)
    scaled = [[value / target for value in row] for row, target in zip(rows, targets, strict=True)]
    wanted = [1 - part / target for part, target in zip(known, targets, strict=True)]
    trust = [1.0] * len(scaled)
    weights: tuple[float, ...] = ()
    for _ in range(_REWEIGHTINGS):
        weights = _least_squares(
            [[value * one for value in row] for row, one in zip(scaled, trust, strict=True)],
            [value * one for value, one in zip(wanted, trust, strict=True)],
        )
        errors = [
            abs(value - sum(a * b for a, b in zip(row, weights, strict=True)))
            for row, value in zip(scaled, wanted, strict=True)
        ]
        trust = [min(1.0, _SQUARED_UP_TO / max(error, 1e-12)) ** 0.5 for error in errors]
    return weights


def _least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> tuple[float, ...]:
    """Weights >= 0 that minimise the squared errors: coordinate descent, columns to one scale."""
    width = len(rows[0])
    norms = [max(sum(row[j] * row[j] for row in rows) ** 0.5, 1e-300) for j in range(width)]
    columns = [[row[j] / norms[j] for row in rows] for j in range(width)]
    weights = [0.0] * width
    residual = list(targets)
    for _ in range(_SWEEPS):
        before = list(weights)
        for j, column in enumerate(columns):
            step = sum(a * b for a, b in zip(column, residual, strict=True))
            new = max(0.0, weights[j] + step)
            moved = new - weights[j]
            if moved:
                residual = [r - moved * c for r, c in zip(residual, column, strict=True)]
                weights[j] = new
        if weights == before:
            break
    return tuple(weight / norm_ for weight, norm_ in zip(weights, norms, strict=True))
