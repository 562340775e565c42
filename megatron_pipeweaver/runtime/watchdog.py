"""Where every rank stands: told when one gets no further, and when one fails.

    rank 0, action 17: `language1.RECV_F3<0#5`, for 61 s
    rank 1, action 12: `vision0.F3[keep]`, for 61 s
    rank 2: failed: ValueError: no such image
    rank 3: has ended the iteration

Each rank writes its position to a board that all ranks of its pipeline can read without each
other's help (the job's store): now and then, and when it fails. Positions carry how long they have
lasted, no times of day, so clocks may differ. A watchdog only speaks; it ends its process only
where it was told to.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Protocol

from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.ir.plan import Plan
from megatron_pipeweaver.ir.plan_text import format_action

_log = logging.getLogger(__name__)

_REASON_LENGTH = 400


class Board(Protocol):
    """What all ranks of a pipeline can read and write at any time; nothing here waits."""

    def write(self, rank: int, text: str) -> None:
        """Replace what `rank` has there."""

    def read(self, rank: int) -> str | None:
        """What `rank` has there, or `None`."""


class StoreBoard:
    """A board in a store of `torch.distributed`.

    Args:
        store: what all ranks share.
        pipeline: tells this pipeline from others in the same store.
    """

    def __init__(self, store: Store, pipeline: str) -> None:
        self._store = PrefixStore(f"pipeweaver/positions/{pipeline}", store)

    def write(self, rank: int, text: str) -> None:
        """See `Board`; a store that is gone is nothing to fail for."""
        try:
            self._store.set(str(rank), text)
        except RuntimeError:
            _log.debug("the store is gone", exc_info=True)

    def read(self, rank: int) -> str | None:
        """See `Board`."""
        try:
            if not self._store.check([str(rank)]):
                return None
            return self._store.get(str(rank)).decode(errors="replace")
        except RuntimeError:
            _log.debug("the store is gone", exc_info=True)
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """A rank that is in one action for `stuck_s` seconds has all ranks' positions logged.

    They are written every `interval_s` seconds. `end_process` also ends this rank's process then,
    with exit code 1; without it that is left to the time limits of waits and to people.
    """

    stuck_s: float = 120.0
    interval_s: float = 5.0
    end_process: bool = False

    def __post_init__(self) -> None:
        if self.stuck_s <= 0 or self.interval_s <= 0:
            raise ConfigError(
                f"watchdog: stuck_s={self.stuck_s}, interval_s={self.interval_s}; need > 0"
            )


class Watchdog:
    """Watches one rank of a pipeline.

    Args:
        rank: its pipeline rank.
        board: where the pipeline's ranks write their positions.
        config: how patient it is.
        say: told where all ranks stand when this one is stuck.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        rank: int,
        board: Board,
        config: WatchConfig,
        *,
        say: Callable[[str], None] = _log.error,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank = rank
        self._board = board
        self._config = config
        self._say = say
        self._clock = clock

    @contextmanager
    def watching(self, plan: Plan, iteration: int) -> Iterator[Callable[[int], None]]:
        """Watch this rank run `plan`; yields what to call with the index of every next action.

        Whatever fails meanwhile is written to the board for the other ranks.

        Raises:
            TransferError: as it came, with where every rank stands on the lines behind.
        """
        position = _Position(self._clock)
        done = Event()
        thread = Thread(
            target=self._watch, args=(plan, iteration, position, done), daemon=True, name="watchdog"
        )
        thread.start()
        try:
            yield position.enter
        except TransferError as error:
            self._write(iteration, position)
            raise TransferError(f"{error}\n{self.describe(plan, iteration)}") from error
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
            self._board.write(self._rank, json.dumps([iteration, "failed", reason]))
            raise
        else:
            position.enter(len(plan.ranks[self._rank]))
        finally:
            done.set()

    def describe(self, plan: Plan, iteration: int) -> str:
        """One line per rank: its next action in `iteration` of `plan`, as far as it is known."""
        return "\n".join(
            f"rank {rank}{self._told(plan, rank, iteration)}" for rank in range(plan.pipeline_size)
        )

    def _watch(self, plan: Plan, iteration: int, position: _Position, done: Event) -> None:
        told = -1
        while not done.wait(min(self._config.interval_s, self._config.stuck_s)):
            self._write(iteration, position)
            index, seconds = position.now()
            if seconds >= self._config.stuck_s and told != index:
                told = index
                # Ranks that stand still as well write their positions at the same pace.
                if done.wait(self._config.interval_s):
                    return
                self._say(
                    f"rank {self._rank} gets no further in iteration {iteration}:\n"
                    f"{self.describe(plan, iteration)}"
                )
                if self._config.end_process:
                    logging.shutdown()
                    os._exit(1)
        index, _ = position.now()
        if index >= len(plan.ranks[self._rank]):
            self._write(iteration, position)

    def _write(self, iteration: int, position: _Position) -> None:
        index, seconds = position.now()
        self._board.write(self._rank, json.dumps([iteration, index, round(seconds)]))

    def _told(self, plan: Plan, rank: int, iteration: int) -> str:
        text = self._board.read(rank)
        if text is None:
            return ": has not been heard of"
        number, index, more = json.loads(text)
        if number != iteration:
            return f": was last heard of in iteration {number}"
        if index == "failed":
            return f": failed: {more}"
        actions = plan.ranks[rank]
        if index >= len(actions):
            return ": has ended the iteration"
        return f", action {index}: `{format_action(plan, actions[index])}`, for {more} s"


class _Position:
    """Which action a rank is in, and since when; one thread writes, one reads."""

    __slots__ = ("_clock", "_entered")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entered = (0, clock())

    def enter(self, index: int) -> None:
        """Action `index` begins now."""
        self._entered = (index, self._clock())

    def now(self) -> tuple[int, float]:
        """(action, seconds in it)."""
        index, since = self._entered
        return index, self._clock() - since
