import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleKind
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.heads import projector
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.memory import module_parameters
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import MODULES, SETUPS, module_preset, setup_preset
from megatron_pipeweaver.semu.stages import stage_parts

BILLION = 10**9

# Published totals (model cards and papers); towers without heads carry their published tower size.
PUBLISHED = {
    "vit-22b": 21.743,
    "llama3-8b": 8.030,
    "llama3-70b": 70.554,
    "qwen2-7b": 7.616,
    "qwen2-32b": 32.764,
    "qwen2-72b": 72.706,
    "qwen2.5-7b": 7.616,
    "qwen2.5-32b": 32.764,
    "qwen2.5-72b": 72.706,
    "qwen3-8b": 8.191,
    "qwen3-30b-a3b": 30.532,
    "deepseek-v2-lite": 15.706,
    "moonlight-16b-a3b": 16.0,
    "deepseek-v3": 671.0,
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


# Whole models, as their cards give them.
PUBLISHED_MODELS = {
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.45,
    "qwen2.5-vl-72b": 73.4,
    "qwen3-vl-8b": 8.77,
    "internvl3-8b": 7.94,
    "llama3.2-11b-vision": 10.6,
    "kimi-vl-a3b": 16.4,  # Moonlight's 16, MoonViT's 0.4
}


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_whole_models_have_their_published_size(name: str) -> None:
    setup = setup_preset(name)
    count = sum(map(module_parameters, setup.model.modules)) / BILLION
    assert count == pytest.approx(PUBLISHED_MODELS[name], rel=0.02)


BY_SIZE = [("vit-5b", 5), ("dit-5b", 5), ("dit-30b", 30), ("moviegen-30b", 30)]


@pytest.mark.parametrize(("name", "billions"), BY_SIZE)
def test_modules_known_by_their_size_alone_come_near_it(name: str, billions: int) -> None:
    count = module_parameters(module_preset(name)) / BILLION
    assert count == pytest.approx(billions, rel=0.15)


def test_every_module_is_covered() -> None:
    of_models = {"llama3.2-vision-vit", "llama3.2-11b-vision-lm", "moonvit-400m"}
    assert set(MODULES) == set(PUBLISHED) | of_models | {name for name, _ in BY_SIZE}
    assert set(SETUPS) == set(PUBLISHED_MODELS) | {name for name, _ in FILLED}


FILLED = [
    ("vlm-s", 16),
    ("vlm-m", 32),
    ("vlm-l", 64),
    ("t2v-s", 16),
    ("t2v-l", 64),
    ("vlm-xl-8k", 8192),
    ("vlm-xl-16k", 16384),
    ("t2v-xl-3k", 3072),
    ("t2v-xl-6k", 6144),
]


@pytest.mark.parametrize(("name", "gpus"), FILLED)
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


def test_layers_of_llama_3_2_vision_read_images_in_place_of_the_text() -> None:
    module = module_preset("llama3.2-11b-vision-lm")
    specs = [layer_spec(module, index) for index in range(module.layers)]
    crossing = [index for index, spec in enumerate(specs) if spec.context_size is not None]
    assert crossing == [3, 8, 13, 18, 23, 28, 33, 38]
    assert [index for index, spec in enumerate(specs) if not spec.self_attention] == crossing
    load = Load(sequence=64, batch=1, lengths=(64,), context_lengths=(1601,))
    plain, crossed = (transformer_layer(specs[index], load, RunOptions()) for index in (0, 3))
    names = {one.name for one in crossed.operators}
    assert "cross_attention" in names
    assert not names & {"qkv", "attention", "proj"}
    assert plain.parameters == crossed.parameters  # as many heads and groups, of one width


def test_windows_taps_and_merged_patches_of_qwen_towers() -> None:
    windowed = module_preset("qwen2.5-vl-vit")
    full = [index for index in range(32) if layer_spec(windowed, index).window is None]
    assert full == [7, 15, 23, 31]
    tapped = module_preset("qwen3-vl-vit")
    stage = StageShape(layers=27, is_first=True, is_last=True)
    load = Load(sequence=1024, batch=1, lengths=(1024,), output_tokens=256)
    parts = stage_parts(tapped, stage, load)
    assert sum(part.copies for part in parts if part.make is projector) == 3 + 1
    graph = next(part.build(RunOptions()) for part in parts if part.make is projector)
    assert graph.operators[0].forward.shape == (256, 4608, 4 * 1152)  # 2 x 2 patches to a token


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="vit-22b"):
        module_preset("vit-1b")
    with pytest.raises(ConfigError, match="vlm-l"):
        setup_preset("vlm-xxl")
