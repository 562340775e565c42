from dataclasses import replace

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import LayerOptions, Modulation
from megatron_pipeweaver.models.diffusion import in_patches, patch_places, sinusoids
from tests.unit.models.examples import cut
from tests.unit.models.videos import OPTIONS, VideoModel, clip_batch, text_to_video

WHOLE = cut(1, text=[2], video=[3])
CUTS = {
    "two ranks": cut(2, text=[1, 1], video=[2, 1]),
    "K 1 and 2": cut(2, text=[2, 0], video=[0, 1, 1, 1]),
    "K 2 and 2, ends without layers": cut(2, text=[0, 1, 1, 0], video=[0, 2, 1, 0]),
    "four ranks": cut(4, text=[1, 0, 1, 0], video=[1, 1, 0, 1]),
}


@pytest.mark.parametrize("modulation", Modulation)
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_is_the_same_model(groups, name, modulation):
    spec = text_to_video(modulation=modulation)
    whole = VideoModel(spec, WHOLE, groups, OPTIONS)
    parts = VideoModel(spec, CUTS[name], groups, OPTIONS)
    for clips, seed in ((4, 1), (1, 2)):
        microbatch = clip_batch(clips, seed=seed)
        expected, found = whole.loss(microbatch), parts.loss(microbatch)
        assert torch.equal(found, expected)
        expected.backward()
        found.backward()
    expected, found = whole.gradients(), parts.gradients()
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12, msg=key)
    # Of the text encoder alone, words that no prompt has have no gradient.
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
