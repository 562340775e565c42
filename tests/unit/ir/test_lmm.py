import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec


def module(name="vision", **changes):
    fields = {
        "name": name,
        "kind": ModuleKind.VISION,
        "layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "attention_heads": 4,
        "kv_groups": 2,
    }
    return ModuleSpec(**(fields | changes))


def model(*modules):
    return ModelSpec(name="m", modules=modules)


def test_modules_find_each_other():
    vision, audio = module("vision"), module("audio")
    language = module("language", after=("vision", "audio"))
    spec = model(vision, audio, language)
    assert spec.backbone is language
    assert spec.module("audio") is audio
    assert spec.consumers("vision") == (language,)
    assert spec.consumers("language") == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "a name is an identifier"),
        ({"name": "clip2"}, "does not end in a digit"),
        ({"name": "a b"}, "a name is an identifier"),
        ({"layers": 0}, "layers is 0; it must be >= 1"),
        ({"layers": 10**12}, "layers is 1000000000000; it must be at most 10000"),
        (
            {"layer": LayerOptions(full_attention_layers=(1, 4))},
            "full_attention_layers names layer 4; there are 4, from 0 on",
        ),
        ({"layer": LayerOptions(tap_layers=(9,))}, "tap_layers names layer 9; there are 4"),
        ({"kv_groups": 0}, "kv_groups is 0"),
        ({"hidden_size": 63}, "hidden_size 63 is not a multiple of attention_heads 4"),
        ({"kv_groups": 3}, "attention_heads 4 is not a multiple of kv_groups 3"),
    ],
)
def test_module_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        module(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (model, "model 'm': no module"),
        (lambda: model(module("a"), module("a", after=("a",))), "names must be unique"),
        (lambda: model(module("a", after=("b",)), module("b")), r"missing before it: \['b'\]"),
        (lambda: model(module("a", after=("a",))), r"missing before it: \['a'\]"),
        (lambda: model(module("a"), module("b")), "nothing consumes module 'a'"),
        (lambda: model(module("a")).module("b"), r"has no module 'b'; it has \['a'\]"),
    ],
)
def test_model_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
