"""Data for `pretrain_vlm.py`: sequences of images and text whose images are handwritten digits.

A sample is a function of (seed, number), so any rank makes any sample, and all jobs that train on
the same seed see the same ones, whatever their parallel sizes are. It shows 0 to `max_images`
images, each followed by the digit that is written on it, and is filled up with counting, a text
that can be learned. With `--mock-data` images and text are random instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.positions import positions_in_space

DIGITS = 10
"""The first tokens of the vocabulary are the digits."""

Microbatch = Mapping[str, Any]
Size = tuple[int, int]
"""Height and width."""
_TEXT_ALONE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What samples look like; sizes in pixels and tokens.

    A token stands for a square of `pixels_per_token` by as many. Images are of `image_size`, or,
    if `dynamic`, each of a size of its own up to that. A position has `position_axes` coordinates.
    """

    seed: int
    sequence_length: int
    vocabulary: int
    image_size: Size
    pixels_per_token: int
    max_images: int
    image_token: int
    dynamic: bool = False
    position_axes: int = 1
    mock: bool = False

    def __post_init__(self) -> None:
        if self.vocabulary < DIGITS:
            raise ConfigError(
                f"--vocab-size {self.vocabulary}: the digits take {DIGITS} tokens; give more"
            )
        rows, columns = self.grid(self.image_size)
        taken = self.max_images * (rows * columns + 1)
        if taken > self.sequence_length:
            raise ConfigError(
                f"--max-images {self.max_images}: take {taken} tokens and a sample has "
                f"--seq-length {self.sequence_length}; give fewer images or a longer sequence"
            )

    def grid(self, size: Size) -> Size:
        """Rows and columns of the tokens that stand for an image of `size`."""
        return size[0] // self.pixels_per_token, size[1] // self.pixels_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens [sequence_length + 1], and the images among them, [Y, X] each."""

    tokens: torch.Tensor
    images: Sequence[torch.Tensor]


class Samples:
    """Samples by number.

    Args:
        options: what they look like.
    """

    def __init__(self, options: SampleOptions) -> None:
        self._options = options

    def microbatch(self, first: int, count: int) -> Microbatch:
        """Samples `first` to ``first + count - 1``, side by side.

        Returns:
            ``images`` fp32 [n, 3, Y, X], or a tuple of [3, Y, X] where sizes are dynamic;
            ``tokens`` and ``labels`` int64 and ``loss_mask`` fp32 [count, sequence_length];
            ``position_ids`` int64, the same or [3, count, sequence_length].
        """
        made = [self._sample(number) for number in range(first, first + count)]
        tokens = torch.stack([one.tokens for one in made])
        images = [image.repeat(3, 1, 1) for one in made for image in one.images]
        labels, is_image = tokens[:, 1:], tokens[:, 1:] == self._options.image_token
        return {
            "images": tuple(images) if self._options.dynamic else self._stacked(images),
            "tokens": tokens[:, :-1].contiguous(),
            # Nobody predicts the place of an image.
            "labels": labels.masked_fill(is_image, 0),
            "loss_mask": (~is_image).float(),
            "position_ids": torch.stack([self._positions(one) for one in made], -2),
        }

    def _stacked(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(images) if images else torch.zeros(0, 3, *self._options.image_size)

    def _positions(self, sample: Sample) -> torch.Tensor:
        """[sequence_length], or [3, sequence_length]."""
        if self._options.position_axes == 1:
            return torch.arange(self._options.sequence_length)
        grids = [self._options.grid((len(one), len(one[0]))) for one in sample.images]
        return positions_in_space(sample.tokens[:-1], self._options.image_token, grids)

    def _sample(self, number: int) -> Sample:
        options = self._options
        rng = np.random.default_rng((options.seed, number))
        most = 0 if rng.random() < _TEXT_ALONE else options.max_images
        count = int(rng.integers(0, most + 1))
        images, digits = self._shown(rng, self._sizes(rng, count))
        tokens: list[int] = []
        for image, digit in zip(images, digits, strict=True):
            rows, columns = options.grid(image.shape)
            tokens += [options.image_token] * (rows * columns) + [int(digit)]
        rest = options.sequence_length + 1 - len(tokens)
        if options.mock:
            text = rng.integers(0, options.vocabulary, rest)
        else:
            start, step = rng.integers(0, DIGITS), rng.integers(1, 4)
            text = (start + step * np.arange(rest)) % DIGITS
        return Sample(
            tokens=torch.from_numpy(np.concatenate([np.array(tokens, dtype=np.int64), text])),
            images=[torch.from_numpy(one) for one in images],
        )

    def _sizes(self, rng: np.random.Generator, count: int) -> list[Size]:
        options = self._options
        if not options.dynamic:
            return [options.image_size] * count
        rows, columns = options.grid(options.image_size)
        grids = rng.integers(1, (rows + 1, columns + 1), (count, 2))
        return [(int(y), int(x)) for y, x in grids * options.pixels_per_token]

    def _shown(
        self, rng: np.random.Generator, sizes: Sequence[Size]
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
        """Images of `sizes`, and the digits on them."""
        count = len(sizes)
        if self._options.mock:
            images = [rng.standard_normal(size, dtype=np.float32) for size in sizes]
            return images, rng.integers(0, DIGITS, count)
        drawn, digits = load_digits()
        chosen = rng.integers(0, len(digits), count)
        images = [stretch(drawn[one], size) for one, size in zip(chosen, sizes, strict=True)]
        return images, digits[chosen]


@functools.cache
def load_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's digits as fp32 [n, 8, 8] of mean 0 and deviation 1, and what they show."""
    from sklearn import datasets

    source = datasets.load_digits()
    images = (source.images - source.images.mean()) / source.images.std()
    return images.astype(np.float32), source.target.astype(np.int64)


def stretch(image: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    """An image whose pixels are repeated as often as `size` takes."""
    rows, columns = (
        np.arange(new) * old // new for new, old in zip(size, image.shape, strict=True)
    )
    return image[rows][:, columns]
