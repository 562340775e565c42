"""What Megatron's arguments say of a model reaches its chunks, or is refused."""

from __future__ import annotations

import argparse

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.configs import chunk_config, root_config
from megatron_pipeweaver.plugin import providers
from megatron_pipeweaver.plugin.providers import model_options, refuse_other_models
from megatron_pipeweaver.plugin.vision_language import VisionLanguage, _language_spec
from megatron_pipeweaver.semu.architecture import layer_spec
from tests.unit.models.examples import cut, vision_language

ARGUMENTS = {
    "params_dtype": torch.float32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.1,
    "max_position_embeddings": 64,
    "img_h": 4,
    "position_embedding_type": "rope",
    "rotary_base": 500,
    "rotary_percent": 0.5,
    "rotary_seq_len_interpolation_factor": 2,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "seed": 1,
}


@pytest.fixture(autouse=True)
def fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what stands in `ARGUMENTS`; the rest is `megatron.training`'s."""
    monkeypatch.setattr(providers, "_given_fields", lambda args: {})


def test_attention_drops_out_by_its_own_flag_where_hidden_states_do_not() -> None:
    options = model_options(argparse.Namespace(**ARGUMENTS), {})
    layout = cut(2, vision=[2, 1], language=[2, 3])
    config = root_config(vision_language(), layout, options)
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.1)


def test_rotary_flags_are_those_of_the_chunks() -> None:
    args = argparse.Namespace(**ARGUMENTS)
    expected = {
        "rotary_base": 500,
        "rotary_percent": 0.5,
        "seq_len_interpolation_factor": 2,
        "rope_scaling": False,
        "rope_scaling_factor": 1.0,
    }
    assert model_options(args, {}).rotary == expected
    args.use_rope_scaling = True
    assert model_options(args, {}).rotary == {
        **expected,
        "rope_scaling": True,
        "rope_scaling_factor": 8.0,
    }


@pytest.mark.parametrize("name", list(providers._NOT_BUILT))
def test_layers_of_another_kind_are_refused_by_their_flag(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^{flag}: cannot be had in chunks: .*; leave it out$"):
        refuse_other_models(argparse.Namespace(**{name: True}))
    refuse_other_models(argparse.Namespace(**{name: None}))


def vision_language_arguments(**more: object) -> argparse.Namespace:
    known = {
        "hf_model": None,
        "num_experts": None,
        "kv_channels": 6,
        "tensor_model_parallel_size": 1,
        "img_w": 4,
        "patch_dim": 2,
        "spatial_merge_size": 1,
    }
    return argparse.Namespace(**{**ARGUMENTS, **known, **more})


def test_a_window_of_the_language_model_is_none_of_the_vit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "_given_fields", lambda args: {"window_size": (3, 0)})
    options = VisionLanguage().options(vision_language_arguments())
    spec, layout = vision_language(), cut(2, vision=[2, 1], language=[2, 3])
    windows = {
        module.name: chunk_config(module, cut_of, layout.chunks_of_rank(0)[0], options).window_size
        for module, cut_of in zip(spec.modules, layout.modules, strict=True)
    }
    assert windows == {"vision": None, "language": (3, 0)}


def test_plans_count_the_window_of_the_language_model() -> None:
    sizes = {
        "group_query_attention": False,
        "multi_latent_attention": False,
        "hidden_size": 24,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "decoder_num_layers": 4,
        "swiglu": False,
        "padded_vocab_size": 64,
        "untie_embeddings_and_output_weights": True,
        "qk_layernorm": False,
    }
    window = {"window_size": (3, 0), "window_attn_skip_freq": 2}
    spec = _language_spec(vision_language_arguments(**sizes, **window))
    assert [layer_spec(spec, layer).window for layer in range(4)] == [4, None, 4, None]
    spec = _language_spec(vision_language_arguments(**sizes))
    assert [layer_spec(spec, layer).window for layer in range(4)] == [None] * 4
    wrong = vision_language_arguments(**sizes, **{**window, "window_attn_skip_freq": [1, 1, 0]})
    with pytest.raises(ConfigError, match="give a 0 or a 1 for each of 4 layers"):
        _language_spec(wrong)


def test_a_microbatch_may_leave_images_out() -> None:
    read = VisionLanguage().describe(vision_language_arguments())
    tokens = torch.zeros(2, 5)
    assert read({"tokens": tokens}) == read({"tokens": tokens, "images": torch.zeros(0, 3, 4, 4)})
