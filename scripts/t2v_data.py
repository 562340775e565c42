"""Data for `pretrain_t2v.py`: packed clips of moving waves, whose prompts say how they move.

A microbatch is a function of (seed, number), so any rank makes any of them, and all jobs that
train on the same seed see the same ones. It holds 1 to `max_clips` clips of different lengths,
their noise and their times as well. With `--mock-data` clips are random instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_pipeweaver.errors import ConfigError

SPEEDS = 8
"""Ways to move along one axis; a prompt's first two tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOptions:
    """What clips look like; sizes in latents, `frames` are those of a whole microbatch at most."""

    seed: int
    frames: int
    height: int
    width: int
    channels: int
    max_clips: int
    prompt_length: int
    vocabulary: int
    mock: bool = False

    def __post_init__(self) -> None:
        if min(self.frames, self.max_clips) < 1:
            raise ConfigError(
                f"--max-clips {self.max_clips}, {self.frames} frames in --seq-length: "
                "a microbatch has at least one clip of one frame; give more"
            )
        if self.prompt_length < 2 or self.vocabulary < SPEEDS:
            raise ConfigError(
                f"--prompt-length {self.prompt_length} --vocab-size {self.vocabulary}: prompts "
                f"have at least 2 tokens of {SPEEDS}"
            )


class ClipSamples:
    """Microbatches by number.

    Args:
        options: what they look like.
    """

    def __init__(self, options: ClipOptions) -> None:
        self._options = options

    def microbatch(self, first: int, count: int) -> Mapping[str, Any]:
        """Microbatch `first`; `count` is 1, as clips are packed already.

        Returns:
            ``clips`` and ``noise``, tuples of fp32 [C, T, Y, X]; ``timesteps`` fp32 [clips];
            ``prompts``, a tuple of int64 [tokens].
        """
        assert count == 1
        options = self._options
        rng = np.random.default_rng((options.seed, first))
        prompts = []
        clips = []
        for frames in self._lengths(rng):
            length = int(rng.integers(2, options.prompt_length + 1))
            prompt = rng.integers(0, options.vocabulary, length)
            prompt[:2] = rng.integers(0, SPEEDS, 2)
            prompts.append(prompt)
            clips.append(self._clip(rng, frames, prompt))
        noise = [rng.standard_normal(clip.shape, dtype=np.float32) for clip in clips]
        return {
            "clips": tuple(map(torch.from_numpy, clips)),
            "noise": tuple(map(torch.from_numpy, noise)),
            "timesteps": torch.from_numpy(rng.random(len(clips), dtype=np.float32)),
            "prompts": tuple(map(torch.from_numpy, prompts)),
        }

    def _lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Frames of each clip: half of what there may be, at least, cut anywhere."""
        most = self._options.frames
        total = int(rng.integers((most + 1) // 2, most + 1))
        count = min(total, int(rng.integers(1, self._options.max_clips + 1)))
        cuts = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
        return np.diff(np.concatenate([[0], cuts, [total]]))

    def _clip(
        self, rng: np.random.Generator, frames: int, prompt: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        options = self._options
        shape = (options.channels, int(frames), options.height, options.width)
        if options.mock:
            return rng.standard_normal(shape, dtype=np.float32)
        channel, time, row, column = np.indices(shape)
        down, right = prompt[:2]
        turns = (row + column) / SPEEDS + time * (down - right) / (2 * SPEEDS)
        return np.sin(2 * np.pi * turns + channel).astype(np.float32)
