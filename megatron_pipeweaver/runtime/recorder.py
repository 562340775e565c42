"""What really happened: every action of a rank with its start and end, gathered into a trace."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch.distributed as dist

from megatron_pipeweaver.ir.codec import trace_from_json, trace_to_json
from megatron_pipeweaver.ir.problem import OpKey
from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow
from megatron_pipeweaver.runtime.agreement import gather_bytes
from megatron_pipeweaver.runtime.clock import Clock, HostClock, Mark


class _Entry(NamedTuple):
    """A row whose times are read when all has run."""

    began: Mark
    ended: Mark
    kind: TraceKind
    key: OpKey
    strategy: str
    peer: int | None
    size_bytes: int | None


class Recorder:
    """Collects one rank's rows of one iteration.

    Args:
        iteration: its number.
        plan_sha256: fingerprint of the plan that runs.
        clock: the device's where the host runs ahead of it, so that rows tell of its work and not
            of its queue; the host's by default.
        on_action: told the index of every action before it runs.
    """

    def __init__(
        self,
        iteration: int,
        plan_sha256: str,
        *,
        clock: Clock | None = None,
        on_action: Callable[[int], None] | None = None,
    ) -> None:
        self._iteration = iteration
        self._plan_sha256 = plan_sha256
        self._clock = clock or HostClock()
        self._on_action = on_action
        self._entries: list[_Entry] = []
        self._start_ns = self._clock.start()

    @property
    def rows(self) -> tuple[TraceRow, ...]:
        """The rows so far; times from this rank's own start."""
        elapsed_ns = self._clock.elapsed_ns
        return tuple(
            TraceRow(
                kind=one.kind,
                key=one.key,
                strategy=one.strategy,
                start_ns=elapsed_ns(one.began),
                end_ns=elapsed_ns(one.ended),
                peer=one.peer,
                size_bytes=one.size_bytes,
            )
            for one in self._entries
        )

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

    def leave(
        self,
        began: Mark,
        kind: TraceKind,
        key: OpKey,
        *,
        strategy: str = "",
        peer: int | None = None,
        size_bytes: int | None = None,
    ) -> None:
        """Record that what began at `began`, as `enter` told, ends now."""
        self._entries.append(
            _Entry(began, self._clock.mark(), kind, key, strategy, peer, size_bytes)
        )

    def gather_trace(self, group: dist.ProcessGroup) -> Trace:
        """All ranks' rows, in the order of `group` (a pipeline's ranks), on every rank of it.

        Ranks of one host share a clock, so their rows are set against the earliest start among
        them; across hosts the starts count as one instant.

        Raises:
            TransferError: a rank of the group is gone.
        """
        alone = Trace(
            iteration=self._iteration,
            plan_sha256=self._plan_sha256,
            hosts=(socket.gethostname(),),
            ranks=(self.rows,),
        )
        header = json.dumps([self._start_ns]).encode()
        parts = gather_bytes(header + b"\n" + trace_to_json(alone), group)
        starts = [int(json.loads(part.partition(b"\n")[0])[0]) for part in parts]
        traces = [trace_from_json(part.partition(b"\n")[2], "trace") for part in parts]
        hosts = tuple(trace.hosts[0] for trace in traces)
        first = {
            host: min(start for start, where in zip(starts, hosts, strict=True) if where == host)
            for host in hosts
        }
        return replace(
            alone,
            hosts=hosts,
            ranks=tuple(
                _later(trace.ranks[0], start - first[host])
                for trace, start, host in zip(traces, starts, hosts, strict=True)
            ),
        )


def _later(rows: tuple[TraceRow, ...], by_ns: int) -> tuple[TraceRow, ...]:
    return tuple(
        replace(row, start_ns=row.start_ns + by_ns, end_ns=row.end_ns + by_ns) for row in rows
    )
