"""Measured latencies in place of the roofline: interpolated, never extrapolated in silence."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.work import Operator, Phase

_log = logging.getLogger(__name__)


class Measure(StrEnum):
    """Which amount of an operator's work a table is over."""

    FLOPS = "flops"
    MEMORY_BYTES = "memory_bytes"
    NETWORK_BYTES = "network_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTable:
    """A latency rule from measurements; give it to a cost model as a rule for operator classes.

    `points[phase]` are ``(amount, nanoseconds)`` with growing amounts; between two of them latency
    is a straight line. An amount outside of them is left to SEMU, with a warning.
    """

    measure: Measure
    points: Mapping[Phase, tuple[tuple[int, int], ...]]

    def __post_init__(self) -> None:
        for phase, points in self.points.items():
            numbers = [number for point in points for number in point]
            if not numbers or any(type(one) is not int or one < 0 for one in numbers):
                raise ConfigError(
                    f"measured table, {phase}: give points of whole numbers, none of them below 0"
                )
            if any(before[0] >= after[0] for before, after in pairwise(points)):
                raise ConfigError(f"measured table, {phase}: amounts must grow from point to point")

    def __call__(self, operator: Operator, phase: Phase) -> int | None:
        """The latency of one phase of `operator`, or `None` where the table does not reach."""
        points = self.points.get(phase)
        if points is None:
            return None
        amount: int = getattr(operator.work(phase), self.measure.value)
        if not points[0][0] <= amount <= points[-1][0]:
            _log.warning(
                "operator %s, %s: %d %s lie outside the measured %d to %d; using the roofline",
                operator.name,
                phase,
                amount,
                self.measure,
                points[0][0],
                points[-1][0],
            )
            return None
        above = bisect_left(points, (amount, 0))
        size, time_ns = points[above]
        if size == amount:
            return time_ns
        smaller, shorter_ns = points[above - 1]
        return shorter_ns + (time_ns - shorter_ns) * (amount - smaller) // (size - smaller)
