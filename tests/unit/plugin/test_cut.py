"""How a job is cut: by rule, by flag, or by search, alike on every rank."""

import argparse
import logging

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.planner.settings import CostSettings
from megatron_pipeweaver.plugin.arguments import PipeWeaverArguments
from megatron_pipeweaver.plugin.cut import cut_model, memory_capacity
from megatron_pipeweaver.plugin.flag_values import parse_layers
from megatron_pipeweaver.plugin.text_to_video import TextToVideo
from megatron_pipeweaver.plugin.vision_language import VisionLanguage
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.memory import OptimizerOptions
from megatron_pipeweaver.semu.options import RunOptions
from tests.unit.plugin.test_text_to_video import arguments

SIZES = {"hidden_size": 512, "ffn_hidden_size": 2048, "attention_heads": 8, "kv_groups": 8}
SPEC = ModelSpec(
    name="small",
    modules=(
        ModuleSpec(name="vision", kind=ModuleKind.VISION, layers=8, patch_size=14,
                   output_size=512, **SIZES),
        ModuleSpec(name="language", kind=ModuleKind.LANGUAGE, layers=12, after=("vision",),
                   vocab_size=100_000, **SIZES),
    ),
)  # fmt: skip
ARGS = argparse.Namespace(
    pipeline_model_parallel_size=2, global_batch_size=16, micro_batch_size=1, data_parallel_size=2
)
COSTS = CostSettings(device=load_device("H100"), options=RunOptions())


class Family:
    """A model of up to six images a microbatch."""

    def spec(self, args):
        return SPEC

    def typical(self, args):
        return self.expected(args)[3]

    def expected(self, args):
        return [
            MicrobatchMetadata(
                sequence_length=2048, items={"vision": (Item(units=1024, tokens=256),) * count}
            )
            for count in range(7)
        ]


def cut(**flags):
    return cut_model(ARGS, PipeWeaverArguments(**flags), Family(), COSTS, OptimizerOptions())


def layers(partition):
    return {one.module: one.layers for one in partition.layout.modules}


def test_without_flags_it_is_the_papers():
    assert layers(cut(segments={"vision": 1, "language": 1})) == {
        "vision": (4, 4),
        "language": (6, 6),
    }


def test_given_layers_stay_whatever_is_searched():
    given = {"vision": (1, 2, 3, 2)}
    assert layers(cut(layers=given))["vision"] == (1, 2, 3, 2)
    assert layers(cut(layers=given, balance=True))["vision"] == (1, 2, 3, 2)


def test_layers_of_no_module_are_refused():
    with pytest.raises(ConfigError, match="--pipeweaver-layers audio: no such module"):
        cut(layers={"audio": (1, 1)})


def test_every_rank_finds_the_same_cut_and_logs_it_as_a_flag(caplog):
    with caplog.at_level(logging.INFO, logger="megatron_pipeweaver.plugin.cut"):
        once, again = (cut(segments={"vision": 1, "language": 1}, balance=True) for _ in range(2))
    assert once == again
    # The vocabulary's head takes as long as several layers do.
    first, last = layers(once)["language"]
    assert first > last
    text = caplog.messages[0].split("--pipeweaver-layers ")[1].split()[0]
    assert layers(cut(layers=parse_layers(text))) == layers(once)


def test_what_weights_leave_depends_on_the_cut():
    ours = PipeWeaverArguments(memory_fraction=0.5)
    even, uneven = (
        memory_capacity(ours, SPEC, cut(layers=one).layout, COSTS, OptimizerOptions())
        for one in ({"language": (6, 6)}, {"language": (9, 3)})
    )
    assert even[0] > uneven[0]
    assert even[1] < uneven[1]
    assert sum(even) == sum(uneven)


def test_expected_microbatches_are_those_that_may_come():
    args = argparse.Namespace(
        hf_model=None, img_h=28, img_w=28, patch_dim=14, spatial_merge_size=2, max_images=2,
        micro_batch_size=2, seq_length=64,
    )  # fmt: skip
    family = VisionLanguage()
    found = family.expected(args)
    assert [one.count("vision") for one in found] == [0, 1, 2, 3, 4]
    assert family.typical(args) == found[2]
    clips = TextToVideo().expected(arguments())
    assert [one.count("text") for one in clips] == list(range(1, 9))
    assert TextToVideo().typical(arguments()) == clips[3]
