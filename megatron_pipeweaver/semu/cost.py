"""Operator latency: roofline with efficiency factors, and rules that users put in its place.

The latency of an operator's phase is ``launch + max(compute, memory, network)`` (paper, section
5). A matmul also loses time at small sizes: a size d counts as ``d + half``, so that at ``half``
it reaches half of its rate; latency therefore grows with every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.devices import DeviceProfile, Factors
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Phase, Queue, Work

SECOND_NS = 1_000_000_000
_PERMILLE = 1000

CostRule = Callable[[Operator, Phase], int | None]
"""A user's own latency in nanoseconds of one phase of an operator; `None` leaves it to SEMU."""


def ceil_div(amount: int, rate: int) -> int:
    """``amount / rate``, rounded up."""
    return -(-amount // rate)


def _checked(found: int, operator: Operator, phase: Phase) -> int:
    """What a user's rule says, if it is a time."""
    if type(found) is not int or found < 0:
        raise ConfigError(
            f"own latency rule for {operator.kind.value}, operator {operator.name!r}, {phase}: "
            f"returned {found!r}; return whole nanoseconds, or None to leave it to SEMU"
        )
    return found


class OperatorCosts:
    """Latencies of operators on one device.

    Args:
        profile: rates and factors.
        rules: a user's rule by operator class.
        scale_out: queues whose messages leave the node.
    """

    __slots__ = ("_profile", "_rules", "_scale_out")

    def __init__(
        self,
        profile: DeviceProfile,
        rules: Mapping[OperatorClass, CostRule] | None = None,
        scale_out: frozenset[Queue] = frozenset(),
    ) -> None:
        self._profile = profile
        self._rules = dict(rules or {})
        self._scale_out = scale_out

    def latency_ns(self, operator: Operator, phase: Phase) -> int:
        """Latency of one phase of `operator`, in nanoseconds; 0 where it does nothing."""
        work = operator.work(phase)
        if work == NO_WORK:
            return 0
        rule = self._rules.get(operator.kind)
        if rule is not None:
            found = rule(operator, phase)
            if found is not None:
                return _checked(found, operator, phase)
        return self.work_ns(work, operator.kind, operator.queue, phase)

    def work_ns(
        self,
        work: Work,
        kind: OperatorClass,
        queue: Queue = Queue.COMPUTE,
        phase: Phase = Phase.FORWARD,
    ) -> int:
        """Roofline latency of `work`, in nanoseconds."""
        factors = self._profile.factors_of(kind).of(phase)
        return work.kernels * factors.overhead_ns + max(
            self._compute_ns(work, factors),
            self._memory_ns(work, factors),
            self._network_ns(work, factors, queue),
        )

    def _compute_ns(self, work: Work, factors: Factors) -> int:
        flops = work.flops
        if factors.half_sizes and work.shape:
            effective = prod(
                size + half for size, half in zip(work.shape, factors.half_sizes, strict=True)
            )
            flops = ceil_div(flops * effective, max(1, prod(work.shape)))
        rate = self._profile.spec.flops * factors.compute_permille
        return ceil_div(flops * SECOND_NS * _PERMILLE, rate)

    def _memory_ns(self, work: Work, factors: Factors) -> int:
        rate = self._profile.spec.memory_bandwidth * factors.memory_permille
        return ceil_div(work.memory_bytes * SECOND_NS * _PERMILLE, rate)

    def _network_ns(self, work: Work, factors: Factors, queue: Queue) -> int:
        if not work.steps:
            return 0
        spec = self._profile.spec
        bandwidth, latency_ns = spec.scale_up_bandwidth, spec.link_latency_ns
        if queue is Queue.HOST_LINK:
            # A copy is no message between ranks; what it takes to begin is its overhead.
            bandwidth, latency_ns = spec.host_bandwidth, 0
        elif queue in self._scale_out:
            bandwidth = spec.scale_out_bandwidth
        rate = bandwidth * factors.network_permille
        return work.steps * latency_ns + ceil_div(work.network_bytes * SECOND_NS * _PERMILLE, rate)
