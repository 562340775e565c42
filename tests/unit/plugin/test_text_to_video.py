"""Text-to-video models from Megatron's arguments."""

from __future__ import annotations

import argparse

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item
from megatron_pipeweaver.ir.lmm import Modulation
from megatron_pipeweaver.plugin.text_to_video import TextToVideo, add_text_to_video_arguments
from megatron_pipeweaver.semu.presets import SETUPS


def arguments(*flags: str, **changes: object) -> argparse.Namespace:
    """The paper's T2V-S, as Megatron's parser would have it."""
    parser = add_text_to_video_arguments(argparse.ArgumentParser())
    sizes = (
        "--text-hidden-size 4096 --text-ffn-hidden-size 14336 --text-num-attention-heads 32 "
        "--text-num-query-groups 8"
    )
    args = parser.parse_args([*sizes.split(), *flags])
    megatron = {
        "encoder_num_layers": 32,
        "decoder_num_layers": 28,
        "hidden_size": 3584,
        "ffn_hidden_size": 10240,
        "num_attention_heads": 28,
        "kv_channels": 128,
        "padded_vocab_size": 128256,
        "swiglu": True,
        "qk_layernorm": True,
        "img_h": 16,
        "img_w": 32,
        "patch_dim": 2,
        "seq_length": 8192,
        "max_position_embeddings": 8192,
        "micro_batch_size": 1,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        "pipeline_model_parallel_size": 4,
    }
    return argparse.Namespace(**{**vars(args), **megatron, **changes})


def test_the_papers_model_is_the_preset() -> None:
    expected = SETUPS["t2v-s"].model
    found = TextToVideo().spec(arguments())
    text, video = found.modules
    names = {"diffusion": "video"}
    for one, preset in zip((text, video), expected.modules, strict=True):
        for field in (
            "kind",
            "layers",
            "hidden_size",
            "ffn_hidden_size",
            "attention_heads",
            "kv_groups",
            "after",
            "gated_mlp",
            "vocab_size",
            "input_size",
            "patch_size",
            "image_channels",
            "layer",
        ):
            assert getattr(one, field) == getattr(preset, field), field
        assert one.name == names.get(preset.name, preset.name)
        assert not one.frozen


def test_flags_change_the_model() -> None:
    args = arguments("--freeze-text-encoder", "--modulation", "linear")
    text, video = TextToVideo().spec(args).modules
    assert text.frozen
    assert video.layer.modulation is Modulation.LINEAR


def test_metadata_are_read_off_shapes() -> None:
    read = TextToVideo().describe(arguments())
    clips = (torch.empty(16, 3, 16, 32), torch.empty(16, 1, 8, 8))
    prompts = (torch.empty(5), torch.empty(9))
    found = read({"clips": clips, "prompts": prompts})
    assert found.document_lengths == (3 * 128, 16)
    assert found.sequence_length == 3 * 128 + 16
    assert found.items == {"text": (Item(units=5, tokens=5), Item(units=9, tokens=9))}
    assert read({"clips": clips, "prompts": ()}).items == {}


def test_the_typical_microbatch_fills_the_sequence() -> None:
    found = TextToVideo().typical(arguments())
    assert found.document_lengths == (2048,) * 4
    assert found.count("text") == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_num_layers": None}, "--encoder-num-layers is missing"),
        ({"decoder_num_layers": None}, "--decoder-num-layers is missing"),
        ({"micro_batch_size": 2}, "--micro-batch-size 1"),
        ({"sequence_parallel": True}, "--sequence-parallel"),
        ({"context_parallel_size": 2}, "give --context-parallel-size 1"),
        ({"num_experts": 8}, "--num-experts 8: text-to-video chunks have no experts"),
        ({"img_w": 31}, "--img-w 31"),
        ({"seq_length": 100}, "--seq-length 100"),
        ({"max_position_embeddings": 100}, "--max-position-embeddings 100"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextToVideo().spec(arguments(**changes))


def test_a_whole_model_has_one_pipeline_rank() -> None:
    with pytest.raises(ConfigError, match="add --pipeweaver"):
        TextToVideo().whole(arguments())
