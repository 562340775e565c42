import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies, strategy_name

KEEP, RECOMPUTE, OFFLOAD = LayerStrategy.KEEP, LayerStrategy.RECOMPUTE, LayerStrategy.OFFLOAD
ATTENTION = LayerStrategy.ATTENTION


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ((KEEP,) * 8, "keep"),
        ((RECOMPUTE,), "recompute"),
        ((RECOMPUTE,) * 2 + (KEEP,) * 6, "recompute*2+keep*6"),
        ((OFFLOAD, *(ATTENTION,) * 3, *(KEEP,) * 4), "offload*1+recompute_attention*3+keep*4"),
        ((KEEP, RECOMPUTE, KEEP), "keep*1+recompute*1+keep*1"),
    ],
)
def test_names_read_as_they_are_written(layers, name):
    assert strategy_name(layers) == name
    assert layer_strategies(name, len(layers)) == layers


@given(st.lists(st.sampled_from(LayerStrategy), max_size=12))
def test_a_name_says_what_each_layer_does(layers):
    assert layer_strategies(strategy_name(layers), len(layers)) == tuple(layers)


def test_a_chunk_without_layers_keeps():
    assert strategy_name(()) == "keep"
    assert layer_strategies("recompute", 0) == ()


@pytest.mark.parametrize(
    ("name", "layers", "wrong"),
    [
        ("recompute*2+keep*6", 7, "is of 8 layers and the chunk has 7"),
        ("keep*1", 2, "is of 1 layers and the chunk has 2"),
        ("recompute_2_of_8", 8, "'recompute_2_of_8' is unknown"),
        ("keep*0+recompute*2", 2, "'keep*0' is unknown"),
        ("keep*2+", 2, "'' is unknown"),
        ("keep+recompute", 2, "'keep' is unknown"),
        ("swap*2", 2, "'swap*2' is unknown"),
        ("keep*1 + keep*1", 2, "'keep*1 ' is unknown"),
        ("", 1, "'' is unknown"),
    ],
)
def test_what_is_no_strategy_of_the_chunk_is_refused(name, layers, wrong):
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        layer_strategies(name, layers)
