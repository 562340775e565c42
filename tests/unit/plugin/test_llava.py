"""What chunks of a script's `LLaVAModel` refuse, by flag."""

import argparse

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.llava import Llava


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size 2: .* train scripts/pretrain_vlm"),
        ({"multi_latent_attention": True}, "--multi-latent-attention: .* have none; leave it out"),
        ({"num_experts": 8}, "--num-experts 8: .* train scripts/pretrain_vlm"),
    ],
    ids=str,
)
def test_what_a_whole_model_cannot_do_in_chunks_is_refused_in_one_line(arguments, message):
    args = argparse.Namespace(**{"context_parallel_size": 1, "num_experts": None, **arguments})
    with pytest.raises(ConfigError, match=message) as refusal:
        Llava().spec(args)
    assert "\n" not in str(refusal.value)
