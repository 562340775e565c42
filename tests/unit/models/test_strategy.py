from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.strategy import recomputed_layers
from tests.unit.models.examples import OPTIONS, Model, batch, cut, vision_language

LAYOUT = cut(2, vision=[2, 1], language=[1, 1, 3, 0])


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("keep", 2, (False, False)),
        ("recompute", 2, (True, True)),
        ("recompute", 0, ()),
        ("recompute*1+keep*2", 3, (True, False, False)),
        ("keep*1+recompute*1+keep*1", 3, (False, True, False)),
    ],
)
def test_strategy_names(name, layers, expected):
    assert recomputed_layers(name, layers) == expected


@pytest.mark.parametrize("name", ["offload", "recompute_norm*1+keep*3"])
def test_what_layers_cannot_do_is_refused(name):
    with pytest.raises(ConfigError, match="at run time; plan with"):
        recomputed_layers(name, 4)


@pytest.mark.parametrize("name", ["recompute*2+keep*6", "recompute_2_of_4"])
def test_strategies_of_another_chunk_are_refused(name):
    with pytest.raises(ConfigError, match="memory strategy"):
        recomputed_layers(name, 4)


def names_of(strategy: str, layers: int) -> str:
    if strategy != "half" or layers < 2:
        return "keep" if strategy == "half" else strategy
    return f"recompute*{layers // 2}+keep*{layers - layers // 2}"


def train(model: Model, strategy: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that the forward saved, parameters apart."""
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    torch.manual_seed(12)
    parameters = {one.untyped_storage().data_ptr() for c in model.chunks for one in c.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for chunk in model.chunks:
        chunk.zero_grad()
        chunk.set_strategy(names_of(strategy, len(chunk.layers)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(batch(3, samples=2), sub_microbatch=2)
    for chunk in model.chunks:
        chunk.set_strategy("keep")  # what the forward ran under is baked into its graph
    loss.backward()
    return loss.detach(), model.gradients(), sum(saved.values())


def test_recomputing_changes_memory_and_nothing_else(groups):
    model = Model(vision_language(), LAYOUT, groups, replace(OPTIONS, dropout=0.2))
    loss, gradients, kept = train(model, "keep")
    sizes = {}
    for strategy in ("half", "recompute"):
        again_loss, again, sizes[strategy] = train(model, strategy)
        assert torch.equal(again_loss, loss)
        assert set(again) == set(gradients)
        for name, gradient in gradients.items():
            assert torch.equal(again[name], gradient), (strategy, name)
    assert sizes["recompute"] < sizes["half"] < kept


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
    for strategy in ("keep", "recompute"):
        chunk.zero_grad()
        chunk.set_strategy(strategy)
        chunk.set_input_tensor(hidden)
        chunk({}).square().sum().backward()
        gradients[strategy] = {name: one.grad for name, one in chunk.named_parameters()}
    for name, gradient in gradients["keep"].items():
        assert torch.equal(gradients["recompute"][name], gradient), name
