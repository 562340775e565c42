"""Ends searches that training cannot wait for any longer: the search thread begins, another ends.

search thread   begin(7) -> stop ... search(stop) ......| answers with the best so far
reader thread                          end(7) -> stop --^
"""

from __future__ import annotations

from megatron_pipeweaver._core import Stop


class Stops:
    """The stop of the search under way; requests are numbered in the order in which they came.

    Each side writes its own part first and reads the other's then, so whichever comes second sees
    to the stop, and no lock is needed.
    """

    def __init__(self) -> None:
        self._ended = 0
        self._current = (0, Stop())

    def begin(self, number: int) -> Stop:
        """What ends the search for request `number`, which begins now."""
        stop = Stop()
        self._current = (number, stop)
        self._settle()
        return stop

    def end(self, number: int) -> None:
        """End the searches for all requests up to `number`, those to come included."""
        self._ended = max(self._ended, number)
        self._settle()

    def _settle(self) -> None:
        number, stop = self._current
        if number <= self._ended:
            stop.request()
