"""Text-to-video models in chunks: cuts, conditions, shapes, and SEMU's account of them."""

from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.flop_counter import FlopCounterMode

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, Modulation
from megatron_pipeweaver.ir.problem import PassKey, Strategy
from megatron_pipeweaver.models.diffusion import in_patches, patch_places, sinusoids
from megatron_pipeweaver.partition.workload import loads, make_workload
from megatron_pipeweaver.semu.interface import StageShape
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.stages import stage_parts
from megatron_pipeweaver.semu.work import Phase
from tests.unit.models.examples import Model, cut
from tests.unit.models.videos import (
    OPTIONS,
    PROMPTS,
    VOCABULARY,
    clip_batch,
    describe,
    text_to_video,
)

WHOLE = cut(1, text=[2], video=[3])
CUTS = {
    "two ranks": cut(2, text=[1, 1], video=[2, 1]),
    "K 1 and 2": cut(2, text=[2, 0], video=[0, 1, 1, 1]),
    "K 2 and 2, ends without layers": cut(2, text=[0, 1, 1, 0], video=[0, 2, 1, 0]),
    "four ranks": cut(4, text=[1, 0, 1, 0], video=[1, 1, 0, 1]),
}


@pytest.mark.parametrize("modulation", Modulation)
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_is_the_same_model(groups, name, modulation):
    spec = text_to_video(modulation=modulation)
    whole = Model(spec, WHOLE, groups, OPTIONS)
    parts = Model(spec, CUTS[name], groups, OPTIONS)
    for clips, seed in ((4, 1), (1, 2)):
        microbatch = clip_batch(clips, seed=seed)
        expected, found = whole.loss(microbatch), parts.loss(microbatch)
        assert torch.equal(found, expected)
        expected.backward()
        found.backward()
    expected, found = whole.gradients(), parts.gradients()
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12, msg=key)
    # Of the text encoder alone, words that no prompt has have no gradient.
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.fixture(scope="module")
def model(one_process) -> Model:
    spec = text_to_video()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Model(spec, CUTS["K 1 and 2"], groups, OPTIONS)


def gradients_of(model, microbatch, sub_microbatch=100):
    for chunk in model.chunks:
        chunk.zero_grad()
    loss = model.loss(microbatch, sub_microbatch)
    loss.backward()
    return loss.detach(), {name: one.clone() for name, one in model.gradients().items()}


@pytest.mark.parametrize("sub_microbatch", [1, 2, 3])
def test_prompts_in_passes_are_the_prompts_in_one(model, sub_microbatch):
    # Of one length side by side, of others in one row: one prompt's features are the same.
    microbatch = clip_batch(4, prompts=(5, 5, 2, 2), seed=3)
    loss, expected = gradients_of(model, microbatch)
    found_loss, found = gradients_of(model, microbatch, sub_microbatch)
    torch.testing.assert_close(found_loss, loss, rtol=1e-7, atol=1e-7)
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_clips_do_not_see_each_other_or_other_prompts(model):
    microbatch = clip_batch(3)
    one = {
        "clips": microbatch["clips"][1:2],
        "noise": microbatch["noise"][1:2],
        "timesteps": microbatch["timesteps"][1:2],
        "prompts": microbatch["prompts"][1:2],
    }
    lengths = [clip.shape[1] * 2 for clip in microbatch["clips"]]
    alone, together = model.run(one), model.run(microbatch)
    start = lengths[0]
    torch.testing.assert_close(together[:, start : start + lengths[1]], alone, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("what", ["clips", "noise", "timesteps", "prompts"])
def test_every_part_of_the_batch_counts(model, what):
    microbatch = clip_batch(2)
    before = model.run(microbatch)
    changed = {
        "clips": lambda: tuple(one + 1 for one in microbatch["clips"]),
        "noise": lambda: tuple(one + 1 for one in microbatch["noise"]),
        "timesteps": lambda: microbatch["timesteps"] / 2,
        "prompts": lambda: tuple((one + 1) % VOCABULARY for one in microbatch["prompts"]),
    }
    assert not torch.equal(model.run({**microbatch, what: changed[what]()}), before)


def test_patches_see_later_patches_and_words_do_not(model):
    microbatch = clip_batch(1)
    velocity = model.run({**microbatch, "noise": None})
    changed = microbatch["clips"][0].clone()
    changed[:, -1, -1, -1] += 1
    moved = model.run({**microbatch, "noise": None, "clips": (changed,)})
    assert not torch.equal(moved[0, 0], velocity[0, 0])
    prompt = microbatch["prompts"][0].clone()
    prompt[-1] = (prompt[-1] + 1) % VOCABULARY
    first, second = (
        model._through("text", {"prompts": (one,)}, None, (0, 1))
        for one in (microbatch["prompts"][0], prompt)
    )
    assert torch.equal(first[:-1], second[:-1])
    assert not torch.equal(first[-1], second[-1])


def test_without_prompts_nothing_is_cross_attended(model):
    microbatch = clip_batch(2, prompts=())
    _, found = gradients_of(model, microbatch)
    assert not any("cross_attention" in name or name.startswith("text") for name in found)
    assert any("self_attention" in name for name in found)


def test_a_frozen_text_encoder_learns_nothing(groups):
    model = Model(text_to_video(frozen=True), CUTS["two ranks"], groups, OPTIONS)
    _, found = gradients_of(model, clip_batch(3))
    assert {name.split(".")[0] for name in found} == {"video_model"}
    # The width's change stands in the diffusion model, which learns it.
    assert "video_model.embedding.text_in.weight" in found


@pytest.mark.parametrize(
    "strategy", ["recompute", "recompute_attention", "recompute_norm", "recompute_light"]
)
def test_every_memory_strategy_has_the_same_gradients(model, strategy):
    microbatch = clip_batch(3, seed=4)
    loss, expected = gradients_of(model, microbatch)
    for chunk in model.chunks:
        chunk.set_strategy(strategy)
    found_loss, found = gradients_of(model, microbatch)
    for chunk in model.chunks:
        chunk.set_strategy("keep")
    assert torch.equal(found_loss, loss)
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("projected", [True, False], ids=["projected", "one width"])
@pytest.mark.parametrize("modulation", Modulation)
def test_plans_know_the_shapes_that_chunks_make(groups, modulation, projected):
    spec = text_to_video(modulation=modulation, projected=projected)
    model = Model(spec, CUTS["K 1 and 2"], groups, OPTIONS)
    for clips, prompts in ((3, (4, 4, 4)), (4, PROMPTS), (2, ())):
        microbatch = clip_batch(clips, prompts=prompts)
        planned = make_workload(
            BatchMetadata(microbatches=(describe(microbatch),)),
            spec,
            model.layout,
            {"text": 8},
            Free(),
            (1, 1),
        )
        features = None
        for module in ("text", "video")[not prompts :]:
            payload = planned.payloads[PassKey(0, module, 0)]
            stages = model.stages(module)
            for chunk in stages:
                chunk.set_input_tensor(features)
                features = chunk(microbatch)
                shape = payload.hidden_shape
                if chunk is stages[-1]:
                    shape = (
                        payload.output_shape
                        if module == "text"
                        else (1, describe(microbatch).sequence_length)
                    )
                assert features.shape == shape
                assert features._base is None
            features = [features]


class Free:
    """Costs of nothing."""

    def stage_strategies(self, module, stage, load):
        return (
            Strategy(name="keep", forward_ns=1, backward_ns=1, weight_grad_ns=0, memory_bytes=0),
        )

    def p2p_latency_ns(self, size_bytes):
        return 0


@pytest.mark.parametrize("modulation", Modulation)
def test_semu_counts_the_flops_of_the_whole_model(groups, modulation):
    spec = text_to_video(modulation=modulation)
    model = Model(spec, WHOLE, groups, OPTIONS)
    microbatch = clip_batch(3, prompts=(4, 4, 4))
    with FlopCounterMode(display=False) as counter:
        model.run(microbatch)
    batch = BatchMetadata(microbatches=(describe(microbatch),))
    options = RunOptions.unfused(element_bytes=8)
    whole = {
        one.name: StageShape(layers=one.layers, is_first=True, is_last=True) for one in spec.modules
    }
    flops = 0
    for module, load in loads(batch, spec, {"text": 8}):
        for part in stage_parts(spec.module(module), whole[module], load):
            flops += part.copies * part.build(options).flops(Phase.FORWARD)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_every_cut_has_the_same_checkpoint_keys(groups):
    def shards(model):
        return {
            (one.key, one.global_shape, one.global_offset)
            for chunk in model.chunks
            for one in chunk.sharded_state_dict().values()
            if isinstance(one, ShardedTensor)
        }

    expected = shards(Model(text_to_video(), WHOLE, groups, OPTIONS))
    assert {key.split(".")[0] for key, *_ in expected} == {"text_model", "video_model"}
    for layout in CUTS.values():
        assert shards(Model(text_to_video(), layout, groups, OPTIONS)) == expected


def test_bfloat16(groups):
    options = replace(OPTIONS, params_dtype=torch.bfloat16)
    model = Model(text_to_video(), CUTS["two ranks"], groups, options)
    losses = model.run(clip_batch(2))
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert {gradient.dtype for gradient in model.gradients().values()} == {torch.bfloat16}


def test_patches_go_frame_by_frame_and_row_by_row():
    module = text_to_video().backbone
    clip = torch.arange(3 * 2 * 4 * 6).view(3, 2, 4, 6)
    patches = in_patches(clip, module)
    places = patch_places([(2, 2, 3)], torch.device("cpu"))
    assert patches.shape == (12, 12)
    for patch, (frame, row, column) in zip(patches, places.int().tolist(), strict=True):
        cut_out = clip[:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patch, cut_out.reshape(-1))


@pytest.mark.parametrize("width", [12, 13, 5])
def test_places_are_told_apart(width):
    places = patch_places([(3, 2, 2)], torch.device("cpu"))
    waves = sinusoids(places, width)
    assert waves.shape == (12, width)
    assert len({tuple(row) for row in waves.tolist()}) == (12 if width > 5 else 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": LayerOptions(context_size=8)}, "context_size 8"),
        ({"layer": LayerOptions(context_size=12)}, "modulation is None"),
        (
            {"layer": LayerOptions(context_size=12, modulation=Modulation.TABLE, rotary=True)},
            "rotary is True",
        ),
        ({"kv_groups": 1}, "kv_groups 1"),
        ({"input_size": None}, "'text': hands on 8 and 'video' takes 12"),
        ({"after": ()}, "nothing consumes"),
    ],
)
def test_what_cannot_be_built_is_refused(groups, changes, message):
    with pytest.raises(ConfigError, match=message):
        Model(changed(**changes), WHOLE, groups, OPTIONS)


def changed(**changes) -> ModelSpec:
    text, video = text_to_video().modules
    return ModelSpec(name="videos", modules=(text, replace(video, **changes)))


def test_sequence_parallelism_is_refused(groups):
    common = {**OPTIONS.common, "sequence_parallel": True, "tensor_model_parallel_size": 2}
    with pytest.raises(ConfigError, match="without sequence parallelism"):
        Model(text_to_video(), WHOLE, groups, replace(OPTIONS, common=common))


def test_misuse_is_refused_by_name(model):
    text, video = model.stages("text")[0], model.stages("video")[0]
    microbatch = clip_batch(2)
    with pytest.raises(ConfigError, match="text0: the microbatch has no 'prompts'"):
        text({})
    with pytest.raises(ConfigError, match="0 passes make 0 text features and the prompts have 8"):
        video(microbatch)
    with pytest.raises(ConfigError, match="2 clips and 1 prompts"):
        video({**microbatch, "prompts": microbatch["prompts"][:1]})
    with pytest.raises(ConfigError, match=r"a clip is \(3, 1, 3, 4\)"):
        video({**microbatch, "clips": (torch.zeros(3, 1, 3, 4),)})
