"""What the training scripts share."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.unit.scripts.conftest import QUICKSTART, script_module


@pytest.fixture
def training_script() -> ModuleType:
    return script_module("training_script", QUICKSTART.parent)


def test_what_passes_take_part_by_part_stays_on_the_host(
    training_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cuda", lambda one, **_: moved.append(one) or one)
    images, tokens, prompts = torch.ones(3, 2), torch.ones(2), (torch.ones(1), torch.ones(4))
    batch = {"images": images, "tokens": tokens, "prompts": prompts}
    found = training_script.on_device(batch, but=("images",))
    assert found.keys() == batch.keys()
    assert found["images"] is images
    assert [one.shape for one in moved] == [(2,), (1,), (4,)]
