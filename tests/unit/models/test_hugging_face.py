"""Imported checkpoints make the logits that `transformers` makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.hugging_face import read_model
from megatron_pipeweaver.models.hugging_face_weights import (
    SafetensorsFolder,
    by_group,
    load_parameters,
)
from megatron_pipeweaver.models.positions import positions_in_space
from tests.unit.models.checkpoints import (
    IMAGE,
    TEXT,
    llava,
    qwen2_vl,
    qwen2_vl_logits,
    save_random,
)
from tests.unit.models.examples import Model, cut, vision_language


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a model of random weights."""
    return partial(save_random, folder=tmp_path / "checkpoint")


def imported(folder: Path, groups: Any) -> Model:
    """The checkpoint in chunks on two ranks, two segments a module."""
    model = read_model(folder)
    layers = {one.name: [one.layers - 2, 1, 1, 0] for one in model.spec.modules}
    made = Model(model.spec, cut(2, **layers), groups, model.options)
    load_parameters(made.chunks, model, SafetensorsFolder(folder))
    return made


def tokens_around(*counts: int) -> torch.Tensor:
    """Text with runs of so many image tokens in it."""
    text = [5, 7]
    for one, count in enumerate(counts):
        text += [*[IMAGE] * count, 9 + one, 3]
    return torch.tensor([[*text, 11, 2]])


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_llava_has_the_logits_of_transformers(text: str, saved: Any, groups: Any) -> None:
    theirs = llava(text)
    ours = imported(saved(theirs), groups)
    tokens = tokens_around(4, 4)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images).logits
        found = ours.run({"tokens": tokens, "images": images}, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


SIZES = {
    "one size": [(16, 16), (16, 16)],
    "as many patches in another shape": [(8, 32), (16, 16), (32, 8)],
    "sizes of their own": [(8, 24), (16, 16), (24, 16), (8, 8)],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_qwen2_vl_has_the_logits_of_transformers(
    sizes: list[tuple[int, int]], tied: bool, saved: Any, groups: Any
) -> None:
    theirs = qwen2_vl(tie_word_embeddings=tied)
    ours = imported(saved(theirs), groups)
    images = tuple(torch.randn(3, *size) for size in sizes)
    grids = [(height // 8, width // 8) for height, width in sizes]
    tokens = tokens_around(*(rows * columns for rows, columns in grids))
    expected, positions = qwen2_vl_logits(theirs, tokens, images)
    batch = {"tokens": tokens, "images": images}
    assert torch.equal(positions_in_space(tokens[0], IMAGE, grids), positions[:, 0])
    with torch.no_grad():
        found = [ours.run({**batch, "position_ids": positions}, count) for count in (1, 2, 4)]
        in_order = ours.run(batch)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert not torch.allclose(in_order, expected, rtol=1e-2, atol=1e-2)


def test_an_image_is_a_clip_that_stands_still(saved: Any, groups: Any) -> None:
    ours = imported(saved(qwen2_vl()), groups)
    images = torch.randn(2, 3, 16, 16)
    batch = {"tokens": tokens_around(4, 4), "images": images}
    # Each frame of a patch is a channel of its own, beside that of the same colour.
    moving = {**batch, "images": images.repeat_interleave(2, 1)}
    torch.testing.assert_close(ours.run(moving), ours.run(batch), rtol=1e-5, atol=1e-5)


def test_names_of_older_checkpoints_are_the_same_tensors(saved: Any, groups: Any) -> None:
    folder = saved(llava("llama"))
    tensors = {name: SafetensorsFolder(folder)[name] for name in SafetensorsFolder(folder)._place}
    old = {}
    for name, one in tensors.items():
        language = name.startswith("language_model.")
        name = name.replace("language_model.", "language_model.model.") if language else name
        name = name.replace("lm_head.", "language_model.lm_head.")
        old[name.replace("vision_tower.", "vision_tower.vision_model.")] = one.clone()
    expected = imported(folder, groups)
    renamed = folder.with_name("old")
    renamed.mkdir()
    shutil.copy(folder / "config.json", renamed)
    half = len(old) // 2
    parts = dict(list(old.items())[:half]), dict(list(old.items())[half:])
    for number, part in enumerate(parts):
        save_file(part, renamed / f"model-{number}.safetensors")
    weight_map = {name: f"model-{n}.safetensors" for n, part in enumerate(parts) for name in part}
    index = renamed / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    batch = {"tokens": tokens_around(4), "images": torch.randn(1, 3, 8, 8)}
    assert torch.equal(imported(renamed, groups).run(batch), expected.run(batch))


def test_heads_of_a_group_stand_side_by_side() -> None:
    module = replace(vision_language().backbone, hidden_size=8, attention_heads=4, kv_groups=2)
    queries, keys, values = (torch.arange(n)[:, None] + at for n, at in ((4, 0), (2, 10), (2, 20)))
    assert by_group([queries, keys, values], module)[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type 'mistral' cannot be imported; .*'qwen2_vl'"),
        ({"vision_feature_select_strategy": "full"}, "only .'default'."),
        ({"vision_feature_layer": [1, 2]}, "give one layer"),
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2' cannot be imported; only 'llama'"),
        (
            {"text_config": {**TEXT, "rope_parameters": {"rope_type": "llama3"}}},
            "rope type 'llama3' cannot be imported",
        ),
        ({"text_config": {**TEXT, "attention_bias": True}}, "attention_bias True cannot"),
        ({"vision_config": {"hidden_act": "silu"}}, "activation 'silu' cannot be imported"),
    ],
)
def test_what_the_chunks_have_not_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **change}))
    with pytest.raises(ConfigError, match=message) as error:
        read_model(tmp_path)
    assert "\n" not in str(error.value)


def test_other_folders_and_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the folder of a Hugging Face checkpoint"):
        read_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no \*.safetensors, only .*pytorch_model.bin"):
        SafetensorsFolder(tmp_path)


def test_tensors_that_do_not_fit_are_refused(saved: Any, groups: Any) -> None:
    folder = saved(llava("llama"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"the checkpoint has \(96, 32\) and the model wants"):
        imported(folder, groups)
