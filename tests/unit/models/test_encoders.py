"""Several vision encoders in front of one language model."""

from dataclasses import replace

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from tests.unit.models.examples import IMAGE, Model, cut, one_pass
from tests.unit.models.sounds import SOUND, TWO_ENCODERS, mixed_batch, vision_audio_language

WHOLE = cut(1, vision=[3], audio=[2], language=[5])
CUTS = {
    "two ranks": cut(2, vision=[2, 1], audio=[1, 1], language=[2, 3]),
    "K 1, 2 and 2": cut(2, vision=[1, 2], audio=[0, 1, 1, 0], language=[2, 1, 1, 1]),
}


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_is_the_same_model(groups, name):
    spec = vision_audio_language()
    whole = Model(spec, WHOLE, groups, TWO_ENCODERS)
    parts = Model(spec, CUTS[name], groups, TWO_ENCODERS)
    for images, sounds in ((3, 2), (0, 2), (2, 0), (0, 0)):
        microbatch = mixed_batch(images, sounds, seed=images)
        expected, found = whole.loss(microbatch), parts.loss(microbatch)
        assert torch.equal(found, expected)
        expected.backward()
        found.backward()
    expected, found = whole.gradients(), parts.gradients()
    assert set(found) == set(expected)
    assert {key.split(".")[0] for key in expected} == {
        "vision_model",
        "vision_projection",
        "audio_model",
        "audio_projection",
        "language_model",
    }
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12, msg=key)
        assert gradient.abs().max() > 0


def test_each_encoder_fills_its_own_places(groups):
    language = Model(vision_audio_language(), WHOLE, groups, TWO_ENCODERS).stages("language")
    seen = []
    layers = language[0].layers[0]
    layers.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    microbatch = mixed_batch(2, 1)
    pictures = torch.full((4, 1, 12), 7.0, dtype=torch.float64)
    sounds = torch.full((9, 1, 12), -7.0, dtype=torch.float64)
    language[0].set_pass(one_pass("language", 0, 1, after=["vision", "vision", "audio"]))
    language[0].set_input_tensor([pictures, pictures, sounds])
    language[0](microbatch)
    row, tokens = seen[0][:, 0], microbatch["tokens"][0]
    assert (row[tokens == IMAGE] == 7).all()
    assert (row[tokens == SOUND] == -7).all()
    assert not torch.isin(row[(tokens != IMAGE) & (tokens != SOUND)].abs(), pictures).any()


def test_who_made_an_input_must_be_known(groups):
    language = Model(vision_audio_language(), WHOLE, groups, TWO_ENCODERS).stages("language")
    language[0].set_input_tensor([torch.zeros(4, 1, 12, dtype=torch.float64)])
    with pytest.raises(ConfigError, match="1 inputs from 0 known modules"):
        language[0](mixed_batch(1, 0))


def test_encoders_have_token_ids_of_their_own(groups):
    with pytest.raises(ConfigError, match="share token ids"):
        Model(vision_audio_language(), WHOLE, groups, replace(TWO_ENCODERS, encoders={}))


def test_an_encoder_without_its_images_says_which(groups):
    audio = Model(vision_audio_language(), WHOLE, groups, TWO_ENCODERS).stages("audio")[0]
    with pytest.raises(ConfigError, match="audio0: the microbatch has no 'sounds'"):
        audio({"images": mixed_batch(1, 0)["images"]})
