import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleKind
from megatron_pipeweaver.semu.memory import module_parameters
from megatron_pipeweaver.semu.presets import MODULES, SETUPS, module_preset, setup_preset

BILLION = 10**9

# Published totals (model cards and papers); towers without heads carry their published tower size.
PUBLISHED = {
    "vit-22b": 21.743,
    "llama3-8b": 8.030,
    "llama3-70b": 70.554,
    "qwen2-7b": 7.616,
    "qwen2-32b": 32.764,
    "qwen2-72b": 72.706,
    "qwen3-8b": 8.191,
    "qwen3-30b-a3b": 30.532,
    "gpt-175b": 174.604,
    "clip-vit-l-336": 0.304,
    "internvit-300m": 0.304,
    "internvit-6b": 5.54,
    "qwen2-vl-vit": 0.675,
    "qwen2.5-vl-vit": 0.676,
    "qwen3-vl-vit": 0.576,
    "wan2.1-14b": 14.29,
    "wan2.1-1.3b": 1.419,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    count = module_parameters(module_preset(name)) / BILLION
    assert count == pytest.approx(PUBLISHED[name], rel=0.02)


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b"])
def test_diffusion_models_have_all_their_parameters(name: str) -> None:
    count = module_parameters(module_preset(name)) / BILLION
    assert count == pytest.approx(PUBLISHED[name], rel=0.0005)


@pytest.mark.parametrize(("name", "billions"), [("vit-5b", 5), ("dit-5b", 5), ("dit-30b", 30)])
def test_modules_known_by_their_size_alone_come_near_it(name: str, billions: int) -> None:
    count = module_parameters(module_preset(name)) / BILLION
    assert count == pytest.approx(billions, rel=0.15)


def test_every_module_is_covered() -> None:
    assert set(MODULES) == set(PUBLISHED) | {"vit-5b", "dit-5b", "dit-30b"}


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("vlm-s", 16),
        ("vlm-m", 32),
        ("vlm-l", 64),
        ("t2v-s", 16),
        ("t2v-l", 64),
        ("vlm-xl-8k", 8192),
        ("vlm-xl-16k", 16384),
        ("t2v-xl-3k", 3072),
        ("t2v-xl-6k", 6144),
    ],
)
def test_setups_fill_their_gpus(name: str, gpus: int) -> None:
    assert setup_preset(name).parallel.world_size == gpus


def test_setups_join_encoder_and_backbone() -> None:
    for setup in SETUPS.values():
        encoder, backbone = setup.model.modules
        assert backbone.after == (encoder.name,)
        if backbone.kind is ModuleKind.LANGUAGE:
            assert encoder.output_size == backbone.hidden_size
        else:
            assert backbone.input_size == encoder.hidden_size
            assert backbone.layer.context_size == backbone.hidden_size


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="vit-22b"):
        module_preset("vit-1b")
    with pytest.raises(ConfigError, match="vlm-l"):
        setup_preset("vlm-xxl")
