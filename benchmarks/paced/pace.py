"""Stages that wait instead of computing: real autograd boundaries, emulated times.

Every tensor that crosses ranks holds the time at which it was made (all ranks share a clock), so
that a stage starts no sooner than its message's emulated latency allows.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How emulated nanoseconds become real ones: times `numerator` over `denominator`.

    `margin_ns` is what a sleep takes longer than asked for, measured on this rank.
    """

    numerator: int
    denominator: int
    margin_ns: int

    def scaled(self, emulated_ns: int) -> int:
        """Real nanoseconds of `emulated_ns`."""
        return emulated_ns * self.numerator // self.denominator

    def wait_until(self, deadline_ns: int) -> None:
        """Sleep until `deadline_ns`, without using the processor."""
        left_ns = deadline_ns - time.perf_counter_ns() - self.margin_ns
        if left_ns > 0:
            time.sleep(left_ns / 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedTimes:
    """One stage's emulated times, and the latencies of the messages that it waits for."""

    forward_ns: int
    backward_ns: int
    input_latencies_ns: tuple[int, ...]
    gradient_latency_ns: int


def measured_margin_ns(tries: int = 100) -> int:
    """How much later than asked for this process wakes up; lowers its timer slack first."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    late = []
    for _ in range(tries):
        started_ns = time.perf_counter_ns()
        time.sleep(0.002)
        late.append(time.perf_counter_ns() - started_ns - 2_000_000)
    return max(0, round(median(late)))


def paced(pace: Pace, times: PacedTimes, inputs: Sequence[Tensor], anchor: Tensor) -> Tensor:
    """A stage's output, after its forward's time; its backward takes its time as well.

    `anchor` is a parameter: the output has a graph where there is no input.
    """
    output: Tensor = _Paced.apply(pace, times, anchor, *inputs)  # type: ignore[no-untyped-call]
    return output


class _Paced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pace: Pace, times: PacedTimes, anchor: Tensor, *inputs: Tensor) -> Tensor:
        del anchor
        ctx.pace, ctx.times, ctx.inputs = pace, times, len(inputs)
        ready_ns = [
            _stamp_ns(tensor) + pace.scaled(latency_ns)
            for tensor, latency_ns in zip(inputs, times.input_latencies_ns, strict=True)
        ]
        return _after(pace, ready_ns, times.forward_ns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pace, times = ctx.pace, ctx.times
        ready_ns = [
            _stamp_ns(tensor) + pace.scaled(times.gradient_latency_ns) for tensor in gradients
        ]
        done = _after(pace, ready_ns, times.backward_ns)
        return (None, None, None, *(done.clone() for _ in range(ctx.inputs)))


def _after(pace: Pace, ready_ns: Sequence[int], length_ns: int) -> Tensor:
    """A stamped tensor, `length_ns` (emulated) after all inputs are there and it is called."""
    start_ns = max(time.perf_counter_ns(), *ready_ns, 0)
    pace.wait_until(start_ns + pace.scaled(length_ns))
    return torch.tensor([[[float(time.perf_counter_ns()), 0.0]]], dtype=torch.float64)


def _stamp_ns(tensor: Tensor) -> int:
    return int(tensor.flatten()[0])
