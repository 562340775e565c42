"""Ctrl-C during a search: the first one ends the search with the best so far, the next the command.

The search runs in a thread of its own, since a signal reaches Python in the main thread alone, and
there not while native code runs.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from megatron_pipeweaver._core import Stop

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def until_interrupted(search: Callable[[Stop], _T]) -> _T:
    """What `search` returns; on Ctrl-C its stop is requested, and what it has by then counts.

    Raises:
        KeyboardInterrupt: Ctrl-C came again.
    """
    stop = Stop()
    with _interrupting(stop), ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(search, stop).result()


@contextmanager
def _interrupting(stop: Stop) -> Iterator[None]:
    """Have the first Ctrl-C request `stop`; later ones interrupt as ever."""

    def request(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request()
        _log.warning("interrupted; this is the best found so far")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
