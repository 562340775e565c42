"""Imported checkpoints make the logits that `transformers` makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
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
from tests.unit.models.examples import Model, cut, vision_language

transformers = pytest.importorskip("transformers")

IMAGE = 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llava(text: str) -> Any:
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={"model_type": text, **TEXT},
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl(**changed: Any) -> Any:
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 24,
            "num_heads": 3,
            "mlp_ratio": 2,
            "patch_size": 4,
            "hidden_size": 32,
        },
        text_config={
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        **changed,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a model of random weights whose norms and biases are no ones and zeros either."""

    def save(model: Any) -> Path:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for one in model.parameters():
                one.copy_(torch.randn(one.shape, generator=generator) * 0.2 + (one.dim() == 1))
        model.eval().save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return save


def imported(folder: Path, groups: Any, image_size: int | None = None) -> Model:
    """The checkpoint in chunks on two ranks, two segments a module."""
    model = read_model(folder, image_size)
    layers = {one.name: [one.layers - 2, 1, 1, 0] for one in model.spec.modules}
    made = Model(model.spec, cut(2, **layers), groups, model.options)
    load_parameters(made.chunks, model, SafetensorsFolder(folder))
    return made


def tokens_around(count: int, images: int) -> torch.Tensor:
    """Text with `images` runs of `count` image tokens in it."""
    text = [5, 7]
    for one in range(images):
        text += [*[IMAGE] * count, 9 + one, 3]
    return torch.tensor([[*text, 11, 2]])


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_llava_has_the_logits_of_transformers(text: str, saved: Any, groups: Any) -> None:
    theirs = llava(text)
    ours = imported(saved(theirs), groups)
    tokens = tokens_around(4, 2)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images).logits
        found = ours.run({"tokens": tokens, "images": images}, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_vl_has_the_logits_of_transformers(tied: bool, saved: Any, groups: Any) -> None:
    theirs = qwen2_vl(tie_word_embeddings=tied)
    ours = imported(saved(theirs), groups, image_size=16)
    tokens = tokens_around(4, 2)
    images = torch.randn(2, 3, 16, 16)
    grid = torch.tensor([[1, 4, 4]] * 2)
    is_image = (tokens == IMAGE).int()
    with torch.no_grad():
        expected = theirs(
            input_ids=tokens,
            pixel_values=processed(images),
            image_grid_thw=grid,
            mm_token_type_ids=is_image,
        ).logits
        positions, _ = theirs.model.get_rope_index(tokens, is_image, grid)
        # Each frame of a patch is a channel of its own, beside that of the same colour.
        frames = images.repeat_interleave(2, 1)
        found = ours.run({"tokens": tokens, "images": frames, "position_ids": positions}, 1)
        in_order = ours.run({"tokens": tokens, "images": frames})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert not torch.allclose(in_order, expected, rtol=1e-2, atol=1e-2)


def processed(images: torch.Tensor, patch: int = 4, merge: int = 2) -> torch.Tensor:
    """Images as Qwen2-VL's processor lays them out: patch by patch, block by block, two frames."""
    count, colours, height, width = images.shape
    frames = images[:, None].expand(count, 2, colours, height, width)
    rows, columns = height // patch // merge, width // patch // merge
    cut_up = frames.reshape(count, 2, colours, rows, merge, patch, columns, merge, patch)
    ordered = cut_up.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(-1, colours * 2 * patch * patch)


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
    batch = {"tokens": tokens_around(4, 1), "images": torch.randn(1, 3, 8, 8)}
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
