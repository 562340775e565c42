"""Settings and metadata as JSON: the same value back, strange ones refused by their place."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.json_reader import parse_json
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.planner.codec import from_json, to_json
from megatron_pipeweaver.planner.settings import settings_from_json, settings_to_json
from megatron_pipeweaver.semu.devices import load_device, shipped_devices
from megatron_pipeweaver.semu.presets import MODULES
from tests.unit.planner.examples import make_settings


@pytest.mark.parametrize("name", sorted(MODULES))
def test_settings_of_any_module_come_back_equal(name):
    module = replace(MODULES[name], after=())
    cut = ModuleLayout(module=module.name, segments=1, layers=(module.layers - 1, 1))
    made = replace(
        make_settings(),
        model=ModelSpec(name=name, modules=(module,)),
        layout=ChunkLayout(pipeline_size=2, modules=(cut,)),
        sub_microbatch={},
        dtypes={module.name: "bfloat16"},
    )
    assert settings_from_json(settings_to_json(made)) == made


@pytest.mark.parametrize("device", shipped_devices())
def test_settings_of_any_device_come_back_equal(device):
    made = make_settings()
    made = replace(made, costs=replace(made.costs, device=load_device(device)))
    again = settings_from_json(settings_to_json(made))
    assert again == made
    assert again.digest == made.digest != make_settings(capacity=1).digest


items = st.lists(st.builds(Item, units=st.integers(1, 99), tokens=st.integers(0, 99)), max_size=3)
microbatches = st.builds(
    MicrobatchMetadata,
    sequence_length=st.integers(100, 200),
    items=st.dictionaries(st.text(max_size=3), items.map(tuple), max_size=2),
    document_lengths=st.lists(st.integers(1, 50), max_size=2).map(tuple),
)


@settings(max_examples=50)
@given(st.lists(microbatches, min_size=1, max_size=3))
def test_metadata_comes_back_equal(rows):
    batch = BatchMetadata(microbatches=tuple(rows))
    data = json.dumps(to_json(batch)).encode()
    assert from_json(parse_json(data, "batch"), BatchMetadata) == batch


def spoilt(path, value):
    root = json.loads(settings_to_json(make_settings()))
    *way, last = path
    inside = root
    for step in way:
        inside = inside[step]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["search", "seed"], None, r"\$\.search: key 'seed' is missing"),
        (["search", "depth"], 1, r"\$\.search: unknown key 'depth'"),
        (["search", "seed"], True, r"\$\.search\.seed: is true; it must be a whole number"),
        (["search", "seed"], "1", r"\$\.search\.seed: is \"1\"; it must be a whole number"),
        (["search", "threads"], 0, r"\$\.search: search: 0 threads; need at least 1"),
        (["search", "tree_alpha"], "much", r"\$\.search\.tree_alpha: is 'much'; it must be a num"),
        (["model", "modules", 0, "kind"], "sound", r"modules\[0\]\.kind: 'sound' is none of"),
        (["costs", "device", "factors"], {"magic": {}}, r"factors: 'magic' is none of \['matmul'"),
        (["memory_capacity_bytes"], 5, r"memory_capacity_bytes: is 5; it must be an array"),
    ],
)
def test_strange_settings_are_refused_by_their_place(path, value, message):
    with pytest.raises(ConfigError, match=message):
        settings_from_json(spoilt(path, value))


def test_a_value_of_another_kind_is_not_written():
    with pytest.raises(TypeError, match="set has no JSON form"):
        to_json({1})
