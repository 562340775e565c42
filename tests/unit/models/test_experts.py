"""Language models with experts, in chunks and in one piece."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_pipeweaver.ir.lmm import ExpertOptions, ModelSpec
from megatron_pipeweaver.models.parameters import global_name, global_parameters
from tests.unit.models.examples import OPTIONS, Model, batch, cut, vision_language

EXPERTS = ExpertOptions(
    count=4, active=2, ffn_hidden_size=10, shared_ffn_hidden_size=6, dense_layers=1
)


def with_experts(experts: ExpertOptions = EXPERTS) -> ModelSpec:
    """The small model whose language layers have experts."""
    spec = vision_language()
    vision, language = spec.modules
    layer = replace(language.layer, experts=experts)
    return replace(spec, modules=(vision, replace(language, layer=layer)))


ROUTED = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_aux_loss_coeff": 0.1,
    "add_bias_linear": False,  # shared experts have none
}
OPTIONS_OF_EXPERTS = replace(OPTIONS, overrides={"language": ROUTED})
PIECES = (cut(1, vision=[3], language=[5]), cut(2, vision=[2, 1], language=[1, 2, 2, 0]))


def test_chunks_have_the_loss_and_gradients_of_the_whole_model(groups):
    whole, chunks = (Model(with_experts(), one, groups, OPTIONS_OF_EXPERTS) for one in PIECES)
    microbatch = batch(3, samples=2)
    losses = [one.loss(microbatch) for one in (whole, chunks)]
    assert torch.equal(*losses)
    for one in losses:
        one.backward()
    expected = whole.gradients()
    assert {name for name in expected if ".router." in name}
    assert {name for name in expected if ".shared_experts." in name}
    for name, gradient in chunks.gradients().items():
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-12, atol=1e-15)
    assert not expected


def test_dense_layers_stand_in_front(groups):
    chunks = Model(with_experts(), PIECES[1], groups, OPTIONS_OF_EXPERTS).stages("language")
    found = [[isinstance(layer.mlp, MoELayer) for layer in chunk.layers] for chunk in chunks]
    assert found == [[False], [True, True], [True, True], []]


def test_experts_in_every_other_layer_are_cut_like_any(groups):
    spec = with_experts(replace(EXPERTS, dense_layers=0, only_layers=(0, 2, 4)))
    whole, chunks = (Model(spec, one, groups, OPTIONS_OF_EXPERTS) for one in PIECES)
    found = [
        [isinstance(layer.mlp, MoELayer) for layer in chunk.layers]
        for chunk in chunks.stages("language")
    ]
    assert found == [[True], [False, True], [False, True], []]
    losses = [one.loss(batch(2)) for one in (whole, chunks)]
    assert torch.equal(*losses)


def test_encoders_have_no_experts(groups):
    model = Model(with_experts(), PIECES[0], groups, OPTIONS_OF_EXPERTS)
    (vision,) = model.stages("vision")
    assert not any(isinstance(layer.mlp, MoELayer) for layer in vision.layers)


def test_the_auxiliary_loss_reaches_the_router(groups):
    gradients = []
    for coefficient in (0.0, 0.1):
        overrides = {"language": {**ROUTED, "moe_aux_loss_coeff": coefficient}}
        model = Model(with_experts(), PIECES[0], groups, replace(OPTIONS, overrides=overrides))
        model.loss(batch(1)).backward()
        gradients.append(model.gradients()["language_model.decoder.layers.4.mlp.router.weight"])
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("strategy", ["recompute", "recompute_light", "keep*1+recompute*1"])
def test_gradients_are_equal_to_the_last_bit_under_every_strategy(groups, strategy):
    gradients = []
    for name in ("keep", strategy):
        model = Model(with_experts(), PIECES[1], groups, OPTIONS_OF_EXPERTS)
        model.stages("language")[1].set_strategy(name)
        model.loss(batch(2)).backward()
        gradients.append(model.gradients())
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


class SecondOfTwo:
    """An expert-parallel group."""

    @staticmethod
    def rank() -> int:
        return 1

    @staticmethod
    def size() -> int:
        return 2


def test_experts_are_counted_from_the_first_rank(groups):
    chunk = Model(with_experts(), PIECES[1], groups, OPTIONS_OF_EXPERTS).stages("language")[1]
    name = "language_model.decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    whole = name.replace("layers.0", "layers.1")
    assert global_name(chunk, name) == whole
    assert whole in dict(global_parameters([chunk]))
    chunk.pg_collection.ep = SecondOfTwo()
    assert global_name(chunk, name) == whole.replace("experts.1", "experts.3")
