"""Operator and tensor nodes on devices: timestamps, tensor lifetimes, memory (paper, section 5).

Nodes stand in a topological order; each device runs its own in that order, one after another. A
tensor lives from the start of its first writer to the end of its last reader.

    compute      | matmul ----- | weight grad ---- | norm --
    tensor link  |              | all-reduce -- |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.work import Queue


class Store(StrEnum):
    """Where a tensor's bytes are."""

    DEVICE = "device"
    HOST = "host"


class Device(NamedTuple):
    """One queue of one rank."""

    rank: int
    queue: Queue


class Memory(NamedTuple):
    """The device memory or the host memory of one rank."""

    rank: int
    store: Store


class TensorNode(NamedTuple):
    """A tensor in `memory`; `pinned` ones live from the beginning to the end."""

    name: str
    size_bytes: int
    memory: Memory
    pinned: bool = False


class OperatorNode(NamedTuple):
    """An operator on `device`; `reads` and `writes` index tensors, `after` other nodes."""

    name: str
    device: Device
    duration_ns: int
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes in a topological order: what one reads is written by an earlier one, or given."""

    operators: tuple[OperatorNode, ...]
    tensors: tuple[TensorNode, ...]

    def __post_init__(self) -> None:
        for index, one in enumerate(self.operators):
            if one.duration_ns < 0:
                raise ConfigError(
                    f"operator {one.name!r}: duration {one.duration_ns} ns is below 0"
                )
            if any(not 0 <= before < index for before in one.after):
                raise ConfigError(
                    f"operator {one.name!r}: `after` must name nodes in front of node {index}"
                )
            if any(not 0 <= tensor < len(self.tensors) for tensor in one.reads + one.writes):
                raise ConfigError(f"operator {one.name!r}: there is no such tensor node")

    def busy_ns(self, queue: Queue) -> int:
        """How long the operators of `queue`, over all ranks, take together."""
        return sum(one.duration_ns for one in self.operators if one.device.queue is queue)


class MemoryStep(NamedTuple):
    """From `time_ns` on, `held_bytes` are held."""

    time_ns: int
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What emulation found: when every operator runs and every tensor lives.

    `lifetimes[t]` is ``(start_ns, end_ns)``, or `None` for a tensor that nobody touches.
    """

    starts_ns: tuple[int, ...]
    ends_ns: tuple[int, ...]
    lifetimes: tuple[tuple[int, int] | None, ...]
    memory: dict[Memory, tuple[MemoryStep, ...]]

    @property
    def duration_ns(self) -> int:
        """End of the last operator."""
        return max(self.ends_ns, default=0)

    def peak_bytes(self, memory: Memory) -> int:
        """The most that `memory` holds at any time."""
        return max((step.held_bytes for step in self.memory.get(memory, ())), default=0)


def emulate(graph: Graph) -> Timeline:
    """Timestamps of all operators, lifetimes of all tensors, memory of all devices.

    An operator starts when its device is free, when the latest writers of what it reads have
    ended, when earlier readers and writers of what it writes have ended, and when all of its
    `after` have.
    """
    starts: list[int] = []
    ends: list[int] = []
    free: dict[Device, int] = {}
    written: list[int] = [0] * len(graph.tensors)
    touched: list[int] = [0] * len(graph.tensors)
    first: list[int | None] = [None] * len(graph.tensors)
    for one in graph.operators:
        start = free.get(one.device, 0)
        for tensor in one.reads:
            start = max(start, written[tensor])
        for tensor in one.writes:
            start = max(start, touched[tensor])
        for before in one.after:
            start = max(start, ends[before])
        end = start + one.duration_ns
        starts.append(start)
        ends.append(end)
        free[one.device] = end
        for tensor in one.writes:
            written[tensor] = end
            if first[tensor] is None:
                first[tensor] = start
        for tensor in (*one.reads, *one.writes):
            touched[tensor] = max(touched[tensor], end)
            if first[tensor] is None:
                first[tensor] = 0  # given from outside
    lifetimes = _lifetimes(graph.tensors, first, touched, max(ends, default=0))
    return Timeline(
        starts_ns=tuple(starts),
        ends_ns=tuple(ends),
        lifetimes=lifetimes,
        memory=memory_timelines(graph.tensors, lifetimes),
    )


def _lifetimes(
    tensors: Sequence[TensorNode],
    first: Sequence[int | None],
    last: Sequence[int],
    duration_ns: int,
) -> tuple[tuple[int, int] | None, ...]:
    found: list[tuple[int, int] | None] = []
    for tensor, start, end in zip(tensors, first, last, strict=True):
        if tensor.pinned:
            found.append((0, duration_ns))
        else:
            found.append(None if start is None else (start, end))
    return tuple(found)


def memory_timelines(
    tensors: Sequence[TensorNode], lifetimes: Sequence[tuple[int, int] | None]
) -> dict[Memory, tuple[MemoryStep, ...]]:
    """Bytes held over time by memory; what ends at an instant is gone before what starts there."""
    changes: dict[Memory, dict[int, int]] = {}
    for tensor, lifetime in zip(tensors, lifetimes, strict=True):
        if lifetime is None:
            continue
        steps = changes.setdefault(tensor.memory, {})
        start, end = lifetime
        steps[start] = steps.get(start, 0) + tensor.size_bytes
        steps[end] = steps.get(end, 0) - tensor.size_bytes
    timelines = {}
    for memory, steps in changes.items():
        held = 0
        timeline = []
        for time_ns in sorted(steps):
            held += steps[time_ns]
            timeline.append(MemoryStep(time_ns, held))
        timelines[memory] = tuple(timeline)
    return timelines
