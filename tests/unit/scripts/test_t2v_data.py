"""The clips that `scripts/pretrain_t2v.py` trains on."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError

PATH = Path(__file__).parents[3] / "scripts" / "t2v_data.py"


@pytest.fixture(scope="module")
def data() -> Any:
    spec = importlib.util.spec_from_file_location("t2v_data", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["t2v_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options(data: Any) -> Any:
    return data.ClipOptions(
        seed=3,
        frames=12,
        height=4,
        width=6,
        channels=2,
        max_clips=5,
        prompt_length=7,
        vocabulary=30,
    )


def test_clips_are_as_many_and_as_long_as_they_may_be(data: Any, options: Any) -> None:
    counts, totals, lengths = set(), set(), set()
    for number in range(60):
        batch = data.ClipSamples(options).microbatch(number, 1)
        clips, prompts = batch["clips"], batch["prompts"]
        assert len(clips) == len(prompts) == len(batch["noise"]) == len(batch["timesteps"])
        for clip, noise, prompt in zip(clips, batch["noise"], prompts, strict=True):
            assert clip.shape == noise.shape == (2, clip.shape[1], 4, 6)
            assert clip.dtype == noise.dtype == torch.float32
            assert 2 <= len(prompt) <= 7
            lengths.add(clip.shape[1])
        counts.add(len(clips))
        totals.add(sum(clip.shape[1] for clip in clips))
    assert counts == {1, 2, 3, 4, 5}
    assert totals == set(range(6, 13))
    assert min(lengths) == 1


def test_a_microbatch_is_a_function_of_seed_and_number(data: Any, options: Any) -> None:
    def first_clip(of: Any, number: int) -> torch.Tensor:
        found: torch.Tensor = data.ClipSamples(of).microbatch(number, 1)["noise"][0]
        return found

    again = first_clip(options, 4)
    assert torch.equal(first_clip(options, 4), again)
    assert not torch.equal(first_clip(options, 5)[:, 0], again[:, 0])
    assert not torch.equal(first_clip(replace(options, seed=4), 4)[:, 0], again[:, 0])


def test_prompts_say_how_clips_move(data: Any, options: Any) -> None:
    moved = still = 0
    for number in range(60):
        batch = data.ClipSamples(options).microbatch(number, 1)
        for clip, prompt in zip(batch["clips"], batch["prompts"], strict=True):
            if clip.shape[1] > 1 and prompt[0] == prompt[1]:
                assert torch.equal(clip[:, 0], clip[:, 1])
                still += 1
            elif clip.shape[1] > 1:
                assert not torch.equal(clip[:, 0], clip[:, 1])
                moved += 1
    assert moved
    assert still


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_clips": 0}, "--max-clips 0"),
        ({"frames": 0}, "0 frames in --seq-length"),
        ({"prompt_length": 1}, "--prompt-length 1"),
        ({"vocabulary": 4}, "--vocab-size 4"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    options: Any, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(options, **changes)
