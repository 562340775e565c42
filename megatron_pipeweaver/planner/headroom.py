"""Headroom: how much of a rank's memory plans may count on, by what plans really took.

    measured |            x
             |       x  .          a plan of `usable` bytes is expected to reach the capacity
    capacity |-------.-x---------
             |   x .   |
             | .       |
             +---------+---------- planned
                     usable

A rank's peak may be higher than planned: some tensors are not known to the cost model, backwards
need memory to work in, allocators round up. The excess grows at most in proportion to the plan, so
the largest plans tell most; tiny ones, whose excess is all work space, tell nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError

ALL_PERMILLE = 1000
LEAST_PERMILLE = 500
"""No less of the capacity stays usable, whatever was measured."""
KEPT = 64
"""Iterations of a rank that are kept; the oldest go."""
_TELLING = 8
"""Plans of less than one such part of the capacity tell nothing."""
_LARGE = 2
"""Of the rest, plans of less than one such part of the largest do not count beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeak:
    """One rank's iteration: the most bytes of activations that were planned, and that were held."""

    planned_bytes: int
    measured_bytes: int

    def __post_init__(self) -> None:
        if self.planned_bytes < 0 or self.measured_bytes < 0:
            raise ConfigError(
                f"memory peak: planned {self.planned_bytes}, measured {self.measured_bytes} "
                "bytes; bytes are >= 0"
            )


class Headroom:
    """Learns, rank by rank, what share of the capacity plans may use.

    Args:
        capacity_bytes: what each pipeline rank has for activations.
        before: the shares that were known before, in thousandths; they are kept as long as too
            little was measured to tell.
    """

    def __init__(self, capacity_bytes: Sequence[int], before: Sequence[int] = ()) -> None:
        self._capacity_bytes = tuple(capacity_bytes)
        self._before = tuple(before) or (ALL_PERMILLE,) * len(self._capacity_bytes)
        self._peaks: list[deque[MemoryPeak]] = [deque(maxlen=KEPT) for _ in capacity_bytes]

    def add(self, peaks: Iterable[MemoryPeak]) -> None:
        """Take in one iteration: a peak per rank, or none at all.

        Raises:
            ConfigError: there are peaks of another number of ranks.
        """
        peaks = tuple(peaks)
        if peaks and len(peaks) != len(self._peaks):
            raise ConfigError(
                f"memory peaks: {len(peaks)} of a pipeline of {len(self._peaks)} ranks; "
                "give one per rank"
            )
        for kept, one in zip(self._peaks, peaks, strict=False):
            kept.append(one)

    def usable_permille(self) -> tuple[int, ...]:
        """What plans may use of each rank's capacity, in thousandths, rounded down."""
        ranks = zip(self._capacity_bytes, self._peaks, self._before, strict=True)
        return tuple(_usable(capacity, peaks, before) for capacity, peaks, before in ranks)


def _usable(capacity_bytes: int, peaks: Iterable[MemoryPeak], before: int) -> int:
    telling = [one for one in peaks if one.planned_bytes * _TELLING >= max(capacity_bytes, 1)]
    if not telling:
        return before
    largest = max(one.planned_bytes for one in telling)
    shares = [
        ALL_PERMILLE * one.planned_bytes // max(one.planned_bytes, one.measured_bytes)
        for one in telling
        if one.planned_bytes * _LARGE >= largest
    ]
    return max(min(shares), LEAST_PERMILLE)


def usable_bytes(
    capacity_bytes: Sequence[int], usable_permille: Sequence[int] = ()
) -> tuple[int, ...]:
    """`capacity_bytes` per rank, but for the headroom; all of it where no share is given."""
    if not usable_permille:
        return tuple(capacity_bytes)
    return tuple(
        capacity * permille // ALL_PERMILLE
        for capacity, permille in zip(capacity_bytes, usable_permille, strict=True)
    )
