"""The quickstart's data: read handwritten digits, and do small sums.

A sequence shows 0 to 12 of scikit-learn's bundled 8 x 8 digit images and is followed, image by
image, by the digit that was written; sums in words and digits follow or stand alone::

    read <image>*4 : 7  <image>*4 : 3  sum  three plus 4 = 7  sum  9 plus eight = 1 7

The loss counts answers only (the digits behind ``:`` and ``=``). An answer behind ``:`` depends on
its own image and on nothing before it, so reading with the true answers fed back (teacher forcing)
scores what reading with the model's own answers would.

Everything is a function of (seed, iteration, microbatch), so any rank can make any microbatch,
ahead of time, and all ranks make the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata

NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOCABULARY: tuple[str, ...] = (
    "<pad>",
    "<image>",
    *[str(digit) for digit in range(10)],
    *NUMBER_WORDS,
    "plus",
    "=",
    ":",
    "read",
    "sum",
)
TOKEN_OF: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}
PAD = TOKEN_OF["<pad>"]
IMAGE = TOKEN_OF["<image>"]

IMAGE_SIZE = 8
IMAGE_CHANNELS = 3
"""The written image stands in each channel: megatron-core's ViT takes three."""
MAX_IMAGES = 12
HELD_OUT = 297
MODULE = "vision"

_INK, _MEAN, _DEVIATION = 16.0, 0.305, 0.376
"""The darkest pixel value of the source, and what is left to take off and divide by."""
_SPLIT_SEED = 1797
_TEXT_ONLY_SHARES = (0.1, 0.2, 0.3, 0.5)
_MOST_IMAGES = (6, 9, MAX_IMAGES, MAX_IMAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What a batch of the quickstart looks like.

    `patch_size` cuts an image into ``(8 / patch_size) ** 2`` patches, each one token for the
    language model. Every microbatch holds `samples` sequences, padded to the longest of them.
    """

    seed: int = 0
    microbatches: int = 8
    samples: int = 8
    patch_size: int = 4

    def __post_init__(self) -> None:
        if min(self.microbatches, self.samples) < 1:
            raise ConfigError(
                f"digits: microbatches={self.microbatches}, samples={self.samples}; need >= 1"
            )
        if self.patch_size < 1 or IMAGE_SIZE % self.patch_size:
            raise ConfigError(
                f"digits: patch_size is {self.patch_size}; it must divide {IMAGE_SIZE}"
            )

    @property
    def tokens_per_image(self) -> int:
        """Patches of an image, which are also its tokens."""
        return (IMAGE_SIZE // self.patch_size) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitSet:
    """Images as fp32 ``[n, 8, 8]``, mean 0 and deviation 1, and the digits on them, ``[n]``."""

    images: NDArray[np.float32]
    digits: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One sequence before padding: tokens, which of them are answers, and the images shown."""

    tokens: tuple[int, ...]
    answers: tuple[bool, ...]
    images: tuple[int, ...]
    """Indices into the :class:`DigitSet`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Tensors for the model and the metadata that the planner sees of them.

    `tensors`: ``images`` fp32 ``[n, 3, 8, 8]`` (n may be 0), in the order in which their
    placeholders stand in ``tokens``; ``tokens``, ``labels``, ``position_ids`` int64 ``[b, s]``;
    ``loss_mask`` fp32 ``[b, s]``, 1 where the label is an answer.
    """

    tensors: dict[str, torch.Tensor]
    metadata: MicrobatchMetadata


def load_split() -> tuple[DigitSet, DigitSet]:
    """(training, held-out) digits: 1,500 and 297, the same two sets every time."""
    source = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(source.target))
    images = ((source.images[order] / _INK - _MEAN) / _DEVIATION).astype(np.float32)
    digits = source.target[order].astype(np.int64)
    train = DigitSet(images=images[HELD_OUT:], digits=digits[HELD_OUT:])
    held_out = DigitSet(images=images[:HELD_OUT], digits=digits[:HELD_OUT])
    return train, held_out


class DigitsTask:
    """Microbatches of one split.

    Args:
        config: sizes and seed.
        digits: the images to show; `load_split` makes them.
    """

    def __init__(self, config: TaskConfig, digits: DigitSet) -> None:
        self.config = config
        self._digits = digits

    def metadata(self, iteration: int) -> BatchMetadata:
        """What the batch of `iteration` will hold, without making its tensors."""
        return BatchMetadata(
            microbatches=tuple(
                self._metadata(self._sequences(iteration, index))
                for index in range(self.config.microbatches)
            )
        )

    def microbatch(self, iteration: int, index: int) -> Microbatch:
        """Microbatch `index` of `iteration`."""
        if not 0 <= index < self.config.microbatches:
            raise ConfigError(
                f"digits: microbatch {index} of iteration {iteration}; "
                f"there are {self.config.microbatches}"
            )
        return self._assemble(self._sequences(iteration, index))

    def reading_test(self) -> Iterator[Microbatch]:
        """Every image of the split once, `MAX_IMAGES` a sequence, and no sums."""
        rest = list(range(len(self._digits.digits)))
        while rest:
            sequences = []
            while rest and len(sequences) < self.config.samples:
                shown, rest = rest[:MAX_IMAGES], rest[MAX_IMAGES:]
                sequences.append(self._sequence(shown, ()))
            yield self._assemble(sequences)

    def _sequences(self, iteration: int, index: int) -> list[Sequence]:
        """The sequences of one microbatch.

        Each iteration has a modality mix of its own (how many microbatches are text alone, how
        many images a sequence may show), and within it each microbatch has its own again.
        """
        mix = np.random.default_rng((self.config.seed, 0, iteration))
        rng = np.random.default_rng((self.config.seed, 1, iteration, index))
        text_only = rng.random() < mix.choice(_TEXT_ONLY_SHARES)
        most = int(rng.integers(1, 4)) * int(mix.choice(_MOST_IMAGES)) // 3
        made = []
        for _ in range(self.config.samples):
            count = 0 if text_only else int(rng.integers(most // 3, most + 1))
            shown = rng.integers(0, len(self._digits.digits), count).tolist()
            sums = [_sum_words(rng) for _ in range(1 if count else int(rng.integers(1, 5)))]
            made.append(self._sequence(shown, tuple(sums)))
        return made

    def _sequence(self, shown: list[int], sums: tuple[tuple[str, str], ...]) -> Sequence:
        """`shown` images, each with its digit, then `sums` as (question, answer)."""
        tokens: list[int] = [TOKEN_OF["read"]] if shown else []
        answers = [False] * len(tokens)
        for image in shown:
            tokens += [IMAGE] * self.config.tokens_per_image + [TOKEN_OF[":"]]
            answers += [False] * (self.config.tokens_per_image + 1)
            tokens.append(TOKEN_OF[str(self._digits.digits[image])])
            answers.append(True)
        for question, answer in sums:
            asked = [TOKEN_OF[word] for word in question.split()]
            told = [TOKEN_OF[word] for word in answer.split()]
            tokens += asked + told
            answers += [False] * len(asked) + [True] * len(told)
        return Sequence(tokens=tuple(tokens), answers=tuple(answers), images=tuple(shown))

    def _metadata(self, sequences: list[Sequence]) -> MicrobatchMetadata:
        units = self.config.tokens_per_image
        count = sum(len(one.images) for one in sequences)
        return MicrobatchMetadata(
            sequence_length=max(len(one.tokens) for one in sequences) - 1,
            samples=len(sequences),
            items={MODULE: (Item(units=units, tokens=units),) * count} if count else {},
        )

    def _assemble(self, sequences: list[Sequence]) -> Microbatch:
        metadata = self._metadata(sequences)
        pixels = self._digits.images[[image for one in sequences for image in one.images]]
        shape = (metadata.samples, metadata.sequence_length + 1)
        tokens = np.full(shape, PAD, dtype=np.int64)
        answers = np.zeros(shape, dtype=np.float32)
        for row, one in enumerate(sequences):
            tokens[row, : len(one.tokens)] = one.tokens
            answers[row, : len(one.answers)] = one.answers
        images = torch.from_numpy(pixels)[:, None].repeat(1, IMAGE_CHANNELS, 1, 1)
        positions = torch.arange(metadata.sequence_length).repeat(metadata.samples, 1)
        return Microbatch(
            tensors={
                "images": images,
                "tokens": torch.from_numpy(tokens[:, :-1].copy()),
                "labels": torch.from_numpy(tokens[:, 1:].copy()),
                "loss_mask": torch.from_numpy(answers[:, 1:].copy()),
                "position_ids": positions,
            },
            metadata=metadata,
        )


def answer_kinds(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bool ``[b, s]``: where the label is the digit read from an image (not part of a sum)."""
    return tensors["tokens"] == TOKEN_OF[":"]


def _sum_words(rng: np.random.Generator) -> tuple[str, str]:
    """A sum of two numbers below 10, each a word or a digit, and its digits."""
    numbers = [int(number) for number in rng.integers(0, 10, 2)]
    words = [NUMBER_WORDS[n] if rng.random() < 0.5 else str(n) for n in numbers]
    return f"sum {words[0]} plus {words[1]} =", " ".join(str(sum(numbers)))
