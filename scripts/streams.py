"""Microbatches without end, each a function of its number: what the training scripts read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from megatron.core import parallel_state

Microbatch = Mapping[str, Any]
_EVALUATION_SEED = 1 << 20
"""What evaluation's samples are drawn with beside ``--seed``, so that they are not trained on."""


class Samples(Protocol):
    """Samples by number."""

    def microbatch(self, first: int, count: int) -> Microbatch:
        """Samples `first` to ``first + count - 1``, side by side."""
        ...


class MicrobatchStream:
    """Microbatch after microbatch of one data-parallel rank, without end.

    Replicas take turns as under Megatron's own sampler: of each stretch of samples, as long as
    all replicas' microbatches together, a replica takes its part.

    Args:
        samples: where they come from.
        first: the number of the first sample of all replicas; those consumed before, say.
        size: samples of a microbatch.
        replica: this data-parallel rank.
        replicas: how many there are.
    """

    def __init__(
        self, samples: Samples, *, first: int, size: int, replica: int, replicas: int
    ) -> None:
        self._samples = samples
        self._next = first + replica * size
        self._size = size
        self._stride = replicas * size

    def __iter__(self) -> Iterator[Microbatch]:
        return self

    def __next__(self) -> Microbatch:
        first, self._next = self._next, self._next + self._stride
        return self._samples.microbatch(first, self._size)


def sample_streams(
    args: argparse.Namespace, samples: Callable[[int], Samples]
) -> list[MicrobatchStream]:
    """What is trained on, validated on and tested on, from where training was left.

    Args:
        args: Megatron's.
        samples: makes the samples of a seed.
    """
    consumed = [args.consumed_train_samples, args.consumed_valid_samples, 0]
    return [
        MicrobatchStream(
            samples(args.seed + index * _EVALUATION_SEED),
            first=first,
            size=args.micro_batch_size,
            replica=parallel_state.get_data_parallel_rank(),
            replicas=parallel_state.get_data_parallel_world_size(),
        )
        for index, first in enumerate(consumed)
    ]
