from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.runtime.activations import ActivationMeter
from megatron_pipeweaver.runtime.offload import HostOffload
from tests.unit.models.examples import OPTIONS, Model, batch, cut, vision_language

LAYOUT = cut(2, vision=[2, 1], language=[1, 1, 3, 0])


EVERY = [one.value for one in LayerStrategy if one is not LayerStrategy.KEEP]


def test_strategies_of_another_chunk_are_refused(groups):
    chunk = Model(vision_language(), LAYOUT, groups).stages("vision")[0]
    with pytest.raises(ConfigError, match="is of 3 layers and the chunk has 2"):
        chunk.set_strategy("recompute*2+keep*1")


def test_activations_of_other_mlps_are_refused(groups):
    chunk = Model(vision_language(), LAYOUT, groups).stages("vision")[0]
    chunk.layers[1].mlp = torch.nn.Identity()
    chunk.set_strategy("recompute_light*1+recompute_norm*1")
    with pytest.raises(ConfigError, match=r"layer 2: strategy 'recompute_light' .* a Ident"):
        chunk.set_strategy("recompute_light")


def test_offloading_wants_somewhere_to_offload_to(groups):
    model = Model(vision_language(), LAYOUT, groups)
    model.stages("vision")[0].set_strategy("offload")
    with pytest.raises(ConfigError, match="layer 1: strategy 'offload' and nowhere to"):
        model.loss(batch(1))


def mixture(strategies: Sequence[str], layers: int) -> str:
    """These strategies by turns."""
    return "+".join(f"{strategies[i % len(strategies)]}*1" for i in range(layers)) or "keep"


def train(model: Model, *strategies: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that the forward has left for the backward."""
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    torch.manual_seed(12)
    meter = ActivationMeter(one for chunk in model.chunks for one in chunk.parameters())
    for chunk in model.chunks:
        chunk.zero_grad()
        chunk.set_strategy(mixture(strategies, len(chunk.layers)), HostOffload())
    with meter.recording():
        loss = model.loss(batch(3, samples=2), sub_microbatch=2)
    for chunk in model.chunks:
        chunk.set_strategy("recompute_attention")  # what a forward ran under is in its graph
        for layer in chunk.layers:
            layer._choose(LayerStrategy.LIGHT)
    held = meter.held_bytes
    loss.backward()
    assert meter.held_bytes == 0
    return loss.detach(), model.gradients(), held


def test_strategies_change_memory_and_nothing_else(groups):
    model = Model(vision_language(), LAYOUT, groups, replace(OPTIONS, dropout=0.2))
    loss, gradients, kept = train(model, "keep")
    sizes = {}
    mixtures = [("recompute", "keep"), ("offload", "recompute_light", "keep"), tuple(EVERY)]
    for strategies in [*((one,) for one in EVERY), *mixtures]:
        again_loss, again, sizes[strategies] = train(model, *strategies)
        assert torch.equal(again_loss, loss)
        assert set(again) == set(gradients)
        for name, gradient in gradients.items():
            assert torch.equal(again[name], gradient), (strategies, name)
    for strategy in ("recompute_shared_experts", "recompute_up_projection"):
        assert sizes.pop((strategy,)) == kept  # these layers have none
    assert max(sizes.values()) < kept
    assert sizes["recompute",] < sizes["recompute", "keep"]
    assert sizes["recompute_light",] < min(sizes["recompute_norm",], sizes["recompute_activation",])
    assert sizes["recompute_mlp",] < sizes["recompute_activation",]
    assert sizes["offload",] < sizes["recompute",]


def test_dropout_is_on_in_training_and_off_in_evaluation(groups):
    model = Model(vision_language(), LAYOUT, groups, replace(OPTIONS, dropout=0.2))
    plain = Model(vision_language(), LAYOUT, groups, OPTIONS)
    microbatch = batch(2)
    expected = plain.loss(microbatch)
    assert not torch.equal(model.loss(microbatch), expected)
    for chunk in model.chunks:
        chunk.eval()
        chunk.set_strategy("recompute")
    with torch.no_grad():
        assert torch.equal(model.loss(microbatch), expected)


def test_parameters_get_gradients_behind_an_input_that_has_none(groups):
    chunk = Model(vision_language(), LAYOUT, groups).stages("vision")[1]
    hidden = torch.randn(4, 2, 8, dtype=torch.float64)
    gradients = {}
    for strategy in ("keep", *EVERY):
        chunk.zero_grad()
        chunk.set_strategy(strategy, HostOffload())
        chunk.set_input_tensor(hidden)
        chunk({}).square().sum().backward()
        gradients[strategy] = {name: one.grad for name, one in chunk.named_parameters()}
    for strategy in EVERY:
        for name, gradient in gradients["keep"].items():
            assert torch.equal(gradients[strategy][name], gradient), (strategy, name)
