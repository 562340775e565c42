"""Bytes that one rank comes to hold while all train, brought to all of them beside training.

    planning rank | begin ...... offer(plan) ................... close
    another rank  | begin .................... read(plan) ...... close   result ─► plan

Each round has a thread on every rank and ends within the iteration that began it, at the latest
when the source closes it; nothing is under way between two iterations. The threads have a group of
their own, so collectives of training never meet theirs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Generic, TypeVar

import torch.distributed as dist

from megatron_pipeweaver.errors import PipeWeaverError, TransferError
from megatron_pipeweaver.runtime.agreement import broadcast_bytes

_T = TypeVar("_T")
ROUND_TIMEOUT = timedelta(days=7)
"""For the group: a round lasts as long as an iteration, however long that is."""
_PATIENCE_S = 0.1


class Round(Generic[_T]):
    """One round on one rank.

    Args:
        group: a CPU group that nobody else uses, of all ranks; each begins the same rounds.
        source: the global rank whose bytes are brought to all.
        read: makes of the bytes what `result` returns, in the round's thread; not on the source.
        before: the round before this one, which ends before this one's thread does anything.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        source: int,
        read: Callable[[bytes], _T],
        before: Round[_T] | None = None,
    ) -> None:
        self._group = group
        self._source = source
        self._read = read
        self._offers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._result: _T | PipeWeaverError | None = None
        self.data = b""
        last = None if before is None else before._thread
        self._thread: threading.Thread = threading.Thread(
            target=self._run, args=(last,), daemon=True, name="courier"
        )
        self._thread.start()

    def offer(self, data: bytes) -> None:
        """On the source: bring `data` to all ranks, if nothing was offered before."""
        self._offers.put(data)

    def close(self) -> None:
        """On the source: there is nothing more to bring; elsewhere it does nothing."""
        self._offers.put(b"")

    def brought(self, data: bytes) -> bool:
        """On the source, once closed: whether `data` has gone to all ranks."""
        self._thread.join(_PATIENCE_S)
        over = not self._thread.is_alive()
        return (
            over
            and bool(data)
            and data == self.data
            and not isinstance(self._result, PipeWeaverError)
        )

    def result(self, timeout: timedelta) -> _T:
        """What `read` made of the bytes that the source says it has brought.

        Raises:
            TransferError: they did not come.
            PipeWeaverError: what `read` raised.
        """
        self._thread.join(timeout.total_seconds())
        if isinstance(self._result, PipeWeaverError):
            raise self._result
        if self._thread.is_alive() or self._result is None:
            raise TransferError(f"the plan that rank {self._source} has sent ahead did not come")
        return self._result

    def _run(self, before: threading.Thread | None) -> None:
        try:
            if before is not None:
                before.join()
            mine = self._offers.get() if dist.get_rank() == self._source else None
            self.data = broadcast_bytes(mine, self._group, self._source)
            if self.data and mine is None:
                self._result = self._read(self.data)
        except PipeWeaverError as error:
            self._result = error
