from dataclasses import replace
from functools import partial

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import (
    global_name,
    global_parameters,
    initialize_by_name,
)
from tests.unit.models.examples import OPTIONS, Model, cut, vision_language

LAYOUT = cut(2, vision=[2, 1], language=[2, 3])


class HalfOf:
    """A tensor-parallel group of two."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


def test_layers_are_counted_from_the_module_start(groups):
    chunk = Model(vision_language(), LAYOUT, groups).stages("language")[1]
    name = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
    assert global_name(chunk, name) == name.replace("layers.1", "layers.3")
    assert global_name(chunk, "language_model.output_layer.weight").endswith("output_layer.weight")


def test_values_depend_on_seed_and_name(groups):
    model = Model(vision_language(), LAYOUT, groups)
    before = {name: one.detach().clone() for name, one in global_parameters(model.chunks)}
    initialize_by_name(model.chunks, seed=3)
    after = dict(global_parameters(model.chunks))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    initialize_by_name(model.chunks, seed=4)
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {name for name, value in before.items() if value.dim() > 1}
    matrices = [value for value in before.values() if value.shape == (24, 8)]
    assert len(matrices) == 3  # what each ViT layer makes queries, keys and values with
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_have_a_deviation_of_their_own(groups, tied):
    options = replace(OPTIONS, common={"init_method_std": 0.2, "embedding_init_method_std": 3.0})
    model = Model(vision_language(tied=tied), LAYOUT, groups, options)
    values = dict(global_parameters(model.chunks))
    assert 2 < values["language_model.embedding.word_embeddings.weight"].std() < 4
    assert (values["language_model.output_layer.weight"].std() > 2) == tied
    assert values["language_model.decoder.layers.0.mlp.linear_fc1.weight"].std() < 0.4


def test_values_do_not_depend_on_the_type(groups):
    wide = Model(vision_language(), LAYOUT, groups)
    narrow = Model(vision_language(), LAYOUT, groups, replace(OPTIONS, params_dtype=torch.float32))
    narrow_values = dict(global_parameters(narrow.chunks))
    for name, value in global_parameters(wide.chunks):
        assert torch.equal(value.float(), narrow_values[name]), name


def test_spread_and_constants(groups):
    options = replace(
        OPTIONS,
        common={"init_method_std": 0.02},
        initialize=partial(initialize_by_name, seed=0),
    )
    values = dict(global_parameters(Model(vision_language(), LAYOUT, groups, options).chunks))
    layer = "language_model.decoder.layers.4."
    assert (values[layer + "input_layernorm.weight"] == 1).all()
    assert (values[layer + "input_layernorm.bias"] == 0).all()
    assert (values[layer + "mlp.linear_fc1.bias"] == 0).all()
    assert values[layer + "mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    scaled = 0.02 / (2 * 5) ** 0.5
    assert values[layer + "mlp.linear_fc2.weight"].std().item() == pytest.approx(scaled, rel=0.2)
    fan_in = 3 * 2 * 2
    assert values["vision_model.conv1.weight"].std().item() == pytest.approx(fan_in**-0.5, rel=0.25)


def test_tensor_parallel_ranks_hold_slices_of_one_model(groups):
    """Only initialisation runs here; the halves are what two ranks' layers would hold."""
    whole = Model(vision_language(), LAYOUT, groups).stages("language")[0]
    expected = dict(global_parameters([whole]))
    halves = []
    for rank in range(2):
        chunk = Model(vision_language(), LAYOUT, groups).stages("language")[0]
        for parameter in chunk.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                parameter.data = parameter.data.chunk(2, parameter.partition_dim)[0].clone()
        chunk.pg_collection.tp = HalfOf(rank)
        initialize_by_name([chunk], seed=3)
        halves.append(dict(global_parameters([chunk])))
    split = 0
    for name, value in expected.items():
        first, second = (half[name] for half in halves)
        if not getattr(value, "tensor_model_parallel", False):
            assert torch.equal(first, value)
            assert torch.equal(second, value)
            continue
        split += 1
        dim = value.partition_dim
        if "linear_fc1" in name:
            pairs = zip(first.chunk(2, dim), second.chunk(2, dim), strict=True)
            joined = torch.cat([torch.cat(pair, dim) for pair in pairs], dim)
        else:
            joined = torch.cat([first, second], dim)
        assert torch.equal(joined, value), name
    assert split > 4


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding": "sinus"},
        {"dropout": 1.0},
        {"image_size": 0},
        {"max_sequence_length": 0},
    ],
)
def test_options_check_themselves(changes):
    with pytest.raises(ConfigError, match=f"model options: {next(iter(changes))}"):
        ModelOptions(**changes)


def test_transformer_engine_is_refused_where_it_is_absent(groups):
    if HAVE_TE:
        pytest.skip("Transformer Engine is installed here")
    options = replace(OPTIONS, transformer_engine=True)
    with pytest.raises(ConfigError, match="Transformer Engine cannot be imported"):
        Model(vision_language(), LAYOUT, groups, options)
