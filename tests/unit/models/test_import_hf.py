"""An imported checkpoint is read back by chunks under another cut."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.hugging_face import read_model
from megatron_pipeweaver.models.hugging_face_weights import SafetensorsFolder, load_parameters
from megatron_pipeweaver.models.parameters import global_parameters
from megatron_pipeweaver.plugin.import_hf import write_checkpoint
from megatron_pipeweaver.plugin.vision_language import hugging_face_spec
from tests.unit.models.checkpoints import llava, qwen2_vl
from tests.unit.models.examples import Model, cut

pytest.importorskip("psutil", reason="Megatron writes checkpoints with psutil")

SCRIPT = Path(__file__).parents[3] / "scripts" / "import_hf.py"


def test_an_imported_checkpoint_is_read_by_other_cuts(tmp_path: Path, groups: Any) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    qwen2_vl().save_pretrained(theirs)
    model, tensors = read_model(theirs), SafetensorsFolder(theirs)
    write_checkpoint(model, tensors, out, torch.float32, groups)
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"

    layout = cut(2, vision=[1, 2], language=[1, 1, 1, 0])
    expected, found = (Model(model.spec, layout, groups, model.options) for _ in range(2))
    load_parameters(expected.chunks, model, tensors)
    for _, one in global_parameters(found.chunks):
        torch.nn.init.constant_(one, 7.0)
    states = {f"model{n}": one.sharded_state_dict() for n, one in enumerate(found.chunks)}
    loaded = dist_checkpointing.load(states, str(out / "release"))
    for number, chunk in enumerate(found.chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    values = dict(global_parameters(expected.chunks))
    for name, one in global_parameters(found.chunks):
        assert torch.equal(one, values[name]), name


def test_what_cannot_be_imported_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    llava("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert main([str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("import_hf: ")
    assert "has no *.safetensors" in line
    assert main([str(tmp_path), "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def flags(**changed: Any) -> argparse.Namespace:
    """Megatron's arguments as they fit the small LLaVA."""
    fitting = {
        "hf_model": "theirs",
        "encoder_num_layers": 3,
        "patch_dim": 4,
        "spatial_merge_size": 1,
        "decoder_num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "untie_embeddings_and_output_weights": True,
        "qk_layernorm": False,
        "window_size": None,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
        "vocab_size": 63,
        "padded_vocab_size": 128,
        "freeze_ViT": True,
    }
    return argparse.Namespace(**{**fitting, **changed})


def test_megatrons_arguments_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    llava("llama").config.save_pretrained(tmp_path / "llava")
    model = read_model(tmp_path / "llava")
    vision, language = hugging_face_spec(flags(), model).modules
    assert vision.frozen
    assert language.vocab_size == 128
    with pytest.raises(ConfigError, match=r"--hidden-size 64 with .* its model has 32; give that"):
        hugging_face_spec(flags(hidden_size=64), model)
    with pytest.raises(ConfigError, match=r"--rotary-percent 0\.5 with .* its model has 1\.0"):
        hugging_face_spec(flags(rotary_percent=0.5), model)
    with pytest.raises(ConfigError, match=r"--vocab-size 63 .* has 64 tokens"):
        hugging_face_spec(flags(padded_vocab_size=32), model)
    qwen2_vl().config.save_pretrained(tmp_path / "qwen")
    qwen = read_model(tmp_path / "qwen")
    with pytest.raises(ConfigError, match=r"--spatial-merge-size 1 with .* its model has 2"):
        hugging_face_spec(flags(), qwen)
    vision, _ = hugging_face_spec(flags(spatial_merge_size=2), qwen).modules
    assert vision.layer.rotary
