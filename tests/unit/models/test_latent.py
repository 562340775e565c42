"""Language models with latent attention, in chunks and in one piece."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import LatentOptions, ModelSpec
from tests.unit.models.examples import OPTIONS, Model, batch, cut, vision_language
from tests.unit.models.test_experts import EXPERTS, OPTIONS_OF_EXPERTS

LATENT = LatentOptions(kv_rank=5, query_rank=7, head_size=4, rotary_size=4, value_size=3)


def with_latent(latent: LatentOptions = LATENT, *, experts: bool = False) -> ModelSpec:
    """The small model whose language layers have latent attention."""
    spec = vision_language()
    vision, language = spec.modules
    layer = replace(language.layer, latent=latent, qk_norm=True)
    if experts:
        layer = replace(layer, experts=EXPERTS)
    language = replace(language, layer=layer, kv_groups=language.attention_heads)
    return replace(spec, modules=(vision, language))


PIECES = (cut(1, vision=[3], language=[5]), cut(2, vision=[2, 1], language=[1, 2, 2, 0]))
KINDS = {
    "latent queries": (with_latent(), OPTIONS),
    "whole queries": (with_latent(replace(LATENT, query_rank=None)), OPTIONS),
    "experts": (with_latent(experts=True), OPTIONS_OF_EXPERTS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_have_the_loss_and_gradients_of_the_whole_model(groups, kind):
    spec, options = KINDS[kind]
    whole, chunks = (Model(spec, one, groups, options) for one in PIECES)
    microbatch = batch(3, samples=2)
    losses = [one.loss(microbatch) for one in (whole, chunks)]
    assert torch.equal(*losses)
    for one in losses:
        one.backward()
    expected = whole.gradients()
    assert {name for name in expected if ".linear_kv_up_proj." in name}
    assert {name for name in expected if ".kv_layernorm." in name}
    for name, gradient in chunks.gradients().items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-12, atol=1e-15)
    assert not expected


def test_encoders_have_none(groups):
    model = Model(with_latent(), PIECES[0], groups)
    (vision,), (language,) = model.stages("vision"), model.stages("language")
    attention = [
        [isinstance(one.self_attention, MLASelfAttention) for one in chunk.layers]
        for chunk in (vision, language)
    ]
    assert attention == [[False] * 3, [True] * 5]


@pytest.mark.parametrize("base", [10_000, 50])
def test_positions_turn_by_the_base_of_the_options(groups, base):
    microbatch = batch(2)
    losses = [
        Model(with_latent(), PIECES[1], groups, replace(OPTIONS, rotary_base=one)).loss(microbatch)
        for one in (base, 10_000)
    ]
    assert torch.equal(*losses) == (base == 10_000)


@pytest.mark.parametrize("strategy", ["recompute_up_projection", "recompute_norm*1+recompute*1"])
def test_gradients_are_equal_to_the_last_bit_under_every_strategy(groups, strategy):
    gradients = []
    for name in ("keep", strategy):
        model = Model(with_latent(), PIECES[1], groups)
        model.stages("language")[1].set_strategy(name)
        model.loss(batch(2)).backward()
        gradients.append(model.gradients())
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


@pytest.mark.parametrize("kind", ["mrope", "learned_absolute", "none"])
def test_positions_of_another_kind_are_refused(groups, kind):
    options = replace(OPTIONS, position_embedding=kind)
    with pytest.raises(ConfigError, match=f"latent attention with position_embedding '{kind}'"):
        Model(with_latent(), PIECES[0], groups, options)


def test_latent_attention_of_an_encoder_is_refused(groups):
    spec = with_latent()
    vision, language = spec.modules
    vision = replace(vision, layer=language.layer)
    with pytest.raises(ConfigError, match="only language models' chunks have it"):
        Model(replace(spec, modules=(vision, language)), PIECES[0], groups)
