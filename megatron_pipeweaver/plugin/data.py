"""The next batch, read ahead: its microbatches for training, its metadata for planning."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, MicrobatchMetadata

DescribeMicrobatch = Callable[[Mapping[str, Any]], MicrobatchMetadata]
"""Reads a microbatch's metadata off its tensors' shapes, without copying from a device."""

DataIterator = Iterator[Mapping[str, Any]] | Sequence[Iterator[Mapping[str, Any]] | None] | None


def pull_microbatches(
    data_iterator: DataIterator, count: int
) -> list[Mapping[str, Any]] | list[None]:
    """Exactly `count` microbatches from this rank's one iterator.

    Megatron hands interleaved schedules a list with one iterator per chunk; chunks of one rank
    share a microbatch here, so only the first iterator is read.

    Returns:
        The microbatches in order, or `count` times `None` on a rank that loads no data.

    Raises:
        ConfigError: the iterator ends early.
    """
    source = _first_iterator(data_iterator)
    if source is None:
        return [None] * count
    microbatches = [next(source, None) for _ in range(count)]
    for index, one in enumerate(microbatches):
        if one is None:
            raise ConfigError(
                f"data iterator: ended at microbatch {index} of {count}; "
                "let it yield num_microbatches items per call, or lower --train-iters"
            )
    return microbatches


def describe_batch(
    microbatches: Sequence[Mapping[str, Any] | None], describe: DescribeMicrobatch
) -> BatchMetadata | None:
    """The metadata of `microbatches`; `None` on a rank that loads no data."""
    loaded = [one for one in microbatches if one is not None]
    if not loaded:
        return None
    return BatchMetadata(microbatches=tuple(describe(one) for one in loaded))


class BufferedIterator:
    """An iterator whose next items can be looked at before anyone takes them.

    What the source raises is raised when its turn comes, not when it is looked at.
    """

    def __init__(self, source: Iterator[Mapping[str, Any]]) -> None:
        self._source = source
        self._items: deque[Mapping[str, Any]] = deque()
        self._failure: Exception | None = None
        self.uses = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self

    def __next__(self) -> Mapping[str, Any]:
        if self._items:
            return self._items.popleft()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return next(self._source)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is read that was not taken."""
        return not self._items and self._failure is None

    def peek(self, count: int) -> list[Mapping[str, Any]] | None:
        """The next `count` items, left in place; `None` where there are not as many."""
        while len(self._items) < count and self._failure is None:
            try:
                self._items.append(next(self._source))
            except StopIteration:
                return None
            except Exception as error:
                self._failure = error
        if len(self._items) < count:
            return None
        return [self._items[index] for index in range(count)]


class LookAhead:
    """Takes microbatches from Megatron's iterators, and shows those that come next.

    Only an iterator that has been given twice is read ahead: one that serves a single iteration is
    left where Megatron's own schedules would leave it. Training and evaluation have iterators of
    their own, which do not disturb each other.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[object, BufferedIterator]] = []

    def take(self, data_iterator: DataIterator, count: int) -> list[Mapping[str, Any]] | list[None]:
        """As `pull_microbatches`, what was read ahead coming first."""
        source = _first_iterator(data_iterator)
        if source is None:
            return [None] * count
        buffer = self._buffer(source)
        buffer.uses += 1
        # Megatron's replaying iterator stands above the buffer, and must see every item itself.
        return pull_microbatches(source if _replays(source) else buffer, count)

    def peek(self, data_iterator: DataIterator, count: int) -> list[Mapping[str, Any]] | None:
        """What `take` would return next; `None` where that cannot be known."""
        source = _first_iterator(data_iterator)
        if source is None or self._buffer(source).uses < 2:
            return None
        return self._buffer(source).peek(count)

    def _buffer(self, source: Any) -> BufferedIterator:
        for known, buffer in self._buffers:
            if known is source:
                return buffer
        # What was not read ahead need not be remembered for long.
        busy = [one for one in self._buffers[:-_REMEMBERED] if not one[1].is_empty]
        self._buffers = busy + self._buffers[-_REMEMBERED:]
        made = _below(source) if _replays(source) else BufferedIterator(source)
        self._buffers.append((source, made))
        return made


_REMEMBERED = 4


def _first_iterator(data_iterator: DataIterator) -> Any:
    iterators = data_iterator if isinstance(data_iterator, Sequence) else [data_iterator]
    return iterators[0]


def _replays(source: object) -> bool:
    """Whether `source` is Megatron's iterator that hands out an iteration's items again."""
    return isinstance(source, RerunDataIterator)


def _below(source: RerunDataIterator) -> BufferedIterator:
    """The buffer that `source` reads from, put there if it is not."""
    if not isinstance(source.iterable, BufferedIterator):
        source.iterable = BufferedIterator(source.iterable)
    return source.iterable
