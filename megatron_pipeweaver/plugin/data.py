"""The next batch, read ahead: its microbatches for training, its metadata for planning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
    iterators = data_iterator if isinstance(data_iterator, Sequence) else [data_iterator]
    source = iterators[0]
    if source is None:
        return [None] * count
    microbatches = [next(source, None) for _ in range(count)]
    for index, one in enumerate(microbatches):
        if one is None:
            raise ConfigError(
                f"data iterator: ended at microbatch {index} of {count}; "
                "let it yield num_microbatches items per call, or lower --train-iters"
            )
    return microbatches  # type: ignore[return-value]


def describe_batch(
    microbatches: Sequence[Mapping[str, Any] | None], describe: DescribeMicrobatch
) -> BatchMetadata | None:
    """The metadata of `microbatches`; `None` on a rank that loads no data."""
    loaded = [one for one in microbatches if one is not None]
    if not loaded:
        return None
    return BatchMetadata(microbatches=tuple(describe(one) for one in loaded))
