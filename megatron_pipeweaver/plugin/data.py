"""The next batch, read ahead: its microbatches for training, its metadata for planning."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

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


def is_replaying(data_iterator: DataIterator) -> bool:
    """Whether Megatron's rerun state machine has wound the iterator back for a second run."""
    source = _first_iterator(data_iterator)
    return isinstance(source, RerunDataIterator) and bool(source.replaying)


class LoaderState(TypedDict):
    """How far an iterator has been read: the state of its source, and `skip` items from there on.

    Read ahead, a source is further on than training is; its state is then the one in front of
    what was read ahead, and `skip` counts what training has taken of that. Megatron writes it to
    disk, so it is made of plain values.
    """

    source: Any
    skip: int


@runtime_checkable
class SavableIterator(Protocol):
    """A data iterator that can go on where another one was."""

    def __next__(self) -> Mapping[str, Any]:
        """The next microbatch."""
        ...

    def save_state(self) -> LoaderState:
        """From where a new iterator goes on behind the last microbatch."""
        ...


class BufferedIterator:
    """An iterator whose next items can be looked at before anyone takes them.

    What the source raises is raised when its turn comes, not when it is looked at.
    """

    def __init__(self, source: Iterator[Mapping[str, Any]]) -> None:
        self._source = source
        self._items: deque[Mapping[str, Any]] = deque()
        self._failure: Exception | None = None
        # The source's state in front of the first item that was read ahead, once one was, and how
        # many have been taken since.
        self._state: LoaderState | None = None
        self._taken = 0
        self.uses = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self

    def __next__(self) -> Mapping[str, Any]:
        if self._items:
            self._taken += 1
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
        if self.is_empty and isinstance(self._source, SavableIterator):
            self._state, self._taken = self._source.save_state(), 0
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

    def save_state(self) -> LoaderState:
        """The state behind the last item that was taken, whatever was read ahead.

        Megatron asks for it when it writes a checkpoint (``--dataloader-save``).

        Raises:
            ConfigError: the source cannot tell its state.
        """
        if not isinstance(self._source, SavableIterator):
            raise ConfigError(
                f"--dataloader-save: a {type(self._source).__name__} has no save_state; "
                "leave the flag out, or train with --energon"
            )
        if self.is_empty or self._state is None:
            return self._source.save_state()
        return LoaderState(source=self._state["source"], skip=self._state["skip"] + self._taken)


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


def data_state_hook(original: Callable[..., None]) -> Callable[..., None]:
    """Megatron's `maybe_save_dataloader_state` that takes one iterator per chunk as well.

    The first is the one that is read.
    """

    @functools.wraps(original)
    def save(train_iterator: Any, *more: Any, **named: Any) -> None:
        several = isinstance(train_iterator, list | tuple)
        original(train_iterator[0] if several else train_iterator, *more, **named)

    return save


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
