"""Data for `pretrain_vlm.py`: sequences of images and text whose images are handwritten digits.

A sample is a function of (seed, number), so any rank makes any sample, and all jobs that train on
the same seed see the same ones, whatever their parallel sizes are. It shows 0 to `max_images`
images, each followed by the digit that is written on it, and is filled up with counting, a text
that can be learned. With `--mock-data` images and text are random instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_pipeweaver.errors import ConfigError

DIGITS = 10
"""The first tokens of the vocabulary are the digits."""

Microbatch = Mapping[str, torch.Tensor]
_TEXT_ALONE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What samples look like; sizes in pixels and tokens."""

    seed: int
    sequence_length: int
    vocabulary: int
    image_size: int
    patch_size: int
    max_images: int
    image_token: int
    merge_size: int = 1
    mock: bool = False

    def __post_init__(self) -> None:
        if self.vocabulary < DIGITS:
            raise ConfigError(
                f"--vocab-size {self.vocabulary}: the digits take {DIGITS} tokens; give more"
            )
        taken = self.max_images * (self.tokens_per_image + 1)
        if taken > self.sequence_length:
            raise ConfigError(
                f"--max-images {self.max_images}: take {taken} tokens and a sample has "
                f"--seq-length {self.sequence_length}; give fewer images or a longer sequence"
            )

    @property
    def tokens_per_image(self) -> int:
        """Tokens that stand for an image: its patches, folded `merge_size` by `merge_size`."""
        return (self.image_size // self.patch_size // self.merge_size) ** 2


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
            ``images`` fp32 [n, 3, Y, X]; ``tokens``, ``labels`` and ``position_ids`` int64 and
            ``loss_mask`` fp32 [count, sequence_length].
        """
        made = [self._sample(number) for number in range(first, first + count)]
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in made]))
        images = np.concatenate([images for _, images in made])
        labels, is_image = tokens[:, 1:], tokens[:, 1:] == self._options.image_token
        return {
            "images": torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1),
            "tokens": tokens[:, :-1].contiguous(),
            # Nobody predicts the place of an image.
            "labels": labels.masked_fill(is_image, 0),
            "loss_mask": (~is_image).float(),
            "position_ids": torch.arange(self._options.sequence_length).repeat(count, 1),
        }

    def _sample(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens [sequence_length + 1] and images [n, Y, X] of one sample."""
        options = self._options
        rng = np.random.default_rng((options.seed, number))
        most = 0 if rng.random() < _TEXT_ALONE else options.max_images
        count = int(rng.integers(0, most + 1))
        images, digits = self._shown(rng, count)
        tokens: list[int] = []
        for digit in digits:
            tokens += [options.image_token] * options.tokens_per_image + [int(digit)]
        rest = options.sequence_length + 1 - len(tokens)
        if options.mock:
            text = rng.integers(0, options.vocabulary, rest)
        else:
            start, step = rng.integers(0, DIGITS), rng.integers(1, 4)
            text = (start + step * np.arange(rest)) % DIGITS
        return np.concatenate([np.array(tokens, dtype=np.int64), text]), images

    def _shown(
        self, rng: np.random.Generator, count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        size = self._options.image_size
        if self._options.mock:
            return (
                rng.standard_normal((count, size, size), dtype=np.float32),
                rng.integers(0, DIGITS, count),
            )
        images, digits = load_digits(size)
        chosen = rng.integers(0, len(digits), count)
        return images[chosen], digits[chosen]


@functools.cache
def load_digits(size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's digits as fp32 [n, size, size] of mean 0 and deviation 1, and what they show.

    Every pixel of the 8 x 8 images is repeated as often as it takes.
    """
    from sklearn import datasets

    source = datasets.load_digits()
    place = np.arange(size) * 8 // size
    images = source.images[:, place][:, :, place]
    images = (images - images.mean()) / images.std()
    return images.astype(np.float32), source.target.astype(np.int64)
