"""What really happened: when every action of a rank began and ended, gathered from all ranks."""

from __future__ import annotations

import json
import socket
from array import array
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_pipeweaver.ir.trace import TIME_CODE, ActionTimes
from megatron_pipeweaver.runtime.agreement import gather_bytes
from megatron_pipeweaver.runtime.clock import Clock, HostClock, Mark


class Recorder:
    """Collects the times of one rank's actions in one iteration.

    Args:
        iteration: its number.
        clock: the device's where the host runs ahead of it, so that times tell of its work and not
            of its queue; the host's by default.
        on_action: told the index of every action before it runs.
    """

    def __init__(
        self,
        iteration: int,
        *,
        clock: Clock | None = None,
        on_action: Callable[[int], None] | None = None,
    ) -> None:
        self._iteration = iteration
        self._clock = clock or HostClock()
        self._on_action = on_action
        self._marks: list[Mark] = []
        self._computes: list[bool] = []
        self._start_ns = self._clock.start()

    @property
    def times_ns(self) -> Sequence[int]:
        """Start and end of every action so far, by turns, from this rank's own start."""
        return self._read()

    def _read(self) -> array[int]:
        return array(TIME_CODE, map(self._clock.elapsed_ns, self._marks))

    def start(self, group: dist.ProcessGroup | None = None) -> None:
        """Set the start, behind a barrier of `group`: a common one where clocks are not shared."""
        if group is not None:
            dist.barrier(group)
        self._start_ns = self._clock.start()

    def enter(self, index: int) -> Mark:
        """The time as action `index` begins, for `leave`."""
        if self._on_action is not None:
            self._on_action(index)
        return self._clock.mark()

    def leave(self, began: Mark, *, computes: bool) -> None:
        """Record that the action that `began`, a stage's or a message's, ends now."""
        self._marks.append(began)
        self._marks.append(self._clock.mark())
        self._computes.append(computes)

    def gather(self, group: dist.ProcessGroup, peak_bytes: int | None = None) -> ActionTimes:
        """All ranks' times, in the order of `group` (a pipeline's ranks), on every rank of it.

        Ranks of one host share a clock, so their times are set against the earliest start among
        them; across hosts the starts count as one instant.

        Args:
            group: every rank of it calls this.
            peak_bytes: the most that this rank held, where memory is measured.

        Raises:
            TransferError: a rank of the group is gone.
        """
        times_ns = self._read()
        spans = zip(times_ns[::2], times_ns[1::2], self._computes, strict=True)
        busy_ns = sum(end_ns - start_ns for start_ns, end_ns, computes in spans if computes)
        header = json.dumps([self._start_ns, socket.gethostname(), busy_ns, peak_bytes])
        parts = gather_bytes(header.encode() + b"\n" + times_ns.tobytes(), group)
        heads, _, rows = zip(*(part.partition(b"\n") for part in parts), strict=True)
        starts, hosts, busy, peaks = zip(*map(json.loads, heads), strict=True)
        first = {
            host: min(start for start, where in zip(starts, hosts, strict=True) if where == host)
            for host in hosts
        }
        return ActionTimes(
            iteration=self._iteration,
            hosts=hosts,
            offsets_ns=tuple(
                start - first[host] for start, host in zip(starts, hosts, strict=True)
            ),
            spans=rows,
            busy_ns=busy,
            peak_bytes=peaks,
        )
