import subprocess
import sys

import pytest
import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleKind
from megatron_pipeweaver.semu.architecture import layer_groups, layer_spec
from megatron_pipeweaver.semu.from_megatron import module_from_config
from megatron_pipeweaver.semu.memory import module_parameters
from megatron_pipeweaver.semu.presets import module_preset

LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
QWEN2 = {
    **LLAMA,
    "num_layers": 28,
    "hidden_size": 3584,
    "ffn_hidden_size": 18944,
    "num_attention_heads": 28,
    "num_query_groups": 4,
    "add_qkv_bias": True,
}
DEEPSEEK_V3 = {
    **LLAMA,
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18432,
    "num_attention_heads": 128,
    "num_query_groups": None,
    "qk_layernorm": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "num_moe_experts": 256,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_layer_freq": [0] * 3 + [1] * 58,
}
QWEN3_MOE = {
    **LLAMA,
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 6144,
    "num_query_groups": 4,
    "kv_channels": 128,
    "qk_layernorm": True,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
}
VIT = {"num_layers": 48, "hidden_size": 6144, "ffn_hidden_size": 24576, "num_attention_heads": 48}
CLIP = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("preset", "sizes", "around"),
    [
        ("llama3-8b", LLAMA, {"rotary": True, "vocab_size": 128256}),
        ("qwen2-7b", QWEN2, {"rotary": True, "vocab_size": 152064}),
        ("qwen3-30b-a3b", QWEN3_MOE, {"rotary": True, "vocab_size": 151936}),
        ("deepseek-v3", DEEPSEEK_V3, {"rotary": True, "vocab_size": 129280}),
        ("vit-22b", VIT, {"patch_size": 14}),
        ("clip-vit-l-336", CLIP, {"patch_size": 14, "positions": 577}),
    ],
)
def test_a_config_gives_the_same_module_as_the_preset(preset, sizes, around):
    wanted = module_preset(preset)
    kind = MLATransformerConfig if "kv_lora_rank" in sizes else TransformerConfig
    found = module_from_config(kind(**sizes), name=preset[:2], kind=wanted.kind, **around)
    assert found.layers == wanted.layers
    assert layer_spec(found) == layer_spec(wanted)
    assert module_parameters(found) == module_parameters(wanted)


def test_defaults_are_those_of_megatron_core():
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    found = module_from_config(config, name="text", kind=ModuleKind.TEXT, after=("vision",))
    assert (found.ffn_hidden_size, found.kv_groups, found.layer.head_size) == (256, 4, 16)
    assert found.after == ("vision",)
    spec = layer_spec(found)
    assert (spec.bias, spec.qkv_bias, spec.rms_norm, spec.rotary) == (True, True, False, False)


def moe(**changes):
    sizes = {**QWEN3_MOE, "num_layers": 4, **changes}
    return module_from_config(
        TransformerConfig(**sizes), name="language", kind=ModuleKind.LANGUAGE, rotary=True
    )


def test_experts_may_stand_behind_dense_layers():
    found = moe(moe_layer_freq=[0, 1, 1, 1], moe_shared_expert_intermediate_size=512)
    assert found.layer.experts is not None
    assert found.layer.experts.dense_layers == 1
    assert found.layer.experts.shared_ffn_hidden_size == 512
    assert layer_spec(found, 0).experts is None
    assert layer_spec(found, 1).experts is not None


@pytest.mark.parametrize("pattern", [2, [1, 0, 1, 0]])
def test_experts_may_stand_in_every_other_layer(pattern):
    found = moe(moe_layer_freq=pattern)
    assert found.layer.experts is not None
    assert found.layer.experts.only_layers == (0, 2)
    runs = [(spec.experts is not None, count) for spec, count in layer_groups(found, 0, 4)]
    assert runs == [(True, 1), (False, 1), (True, 1), (False, 1)]


@pytest.mark.parametrize("pattern", [[1, 1], [1, 1, 1, 2]])
def test_other_patterns_of_experts_are_refused(pattern):
    with pytest.raises(ConfigError, match="moe_layer_freq says"):
        moe(moe_layer_freq=pattern)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mla_down_proj_fusion", True), ("mtp_num_layers", 1)],
)
def test_what_is_not_emulated_is_refused(field, value):
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=rf"module 'text': {field} is .* not emulated; use"):
        module_from_config(config, name="text", kind=ModuleKind.TEXT)


@pytest.mark.parametrize(
    ("skip", "whole"), [(None, ()), (3, (2, 5)), ([1, 0, 1, 1, 1, 0], (1, 5))], ids=str
)
def test_windows_slide_in_all_layers_but_some(skip, whole):
    config = TransformerConfig(num_layers=6, hidden_size=64, num_attention_heads=4)
    config.window_size, config.window_attn_skip_freq = (127, 0), skip
    found = module_from_config(config, name="language", kind=ModuleKind.LANGUAGE)
    assert found.layer.full_attention_layers == whole
    windows = [layer_spec(found, layer).window for layer in range(6)]
    assert windows == [None if layer in whole else 128 for layer in range(6)]
    # Megatron's own rule, which counts layers from 1.
    assert windows == [
        128 if is_layer_window_attention((127, 0), skip, layer) else None for layer in range(1, 7)
    ]


@pytest.mark.parametrize(
    ("window", "kind"),
    [((128, 64), ModuleKind.LANGUAGE), ((-1, 0), ModuleKind.TEXT), ((8, 0), ModuleKind.VISION)],
)
def test_other_windows_are_refused(window, kind):
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    config.window_size = window
    with pytest.raises(ConfigError, match=r"window_size is .* emulated are windows \(N, 0\)"):
        module_from_config(config, name="text", kind=kind)


def test_an_unknown_norm_is_refused():
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    config.normalization = "GroupNorm"
    with pytest.raises(ConfigError, match="normalization is 'GroupNorm'; emulated are"):
        module_from_config(config, name="text", kind=ModuleKind.TEXT)


def test_importing_it_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_pipeweaver.semu.from_megatron; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
