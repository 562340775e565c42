from dataclasses import replace

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.models.language import place_image_embeddings
from megatron_pipeweaver.models.vision import fold_patches
from tests.unit.models.examples import (
    IMAGE,
    OPTIONS,
    TOKENS_PER_IMAGE,
    VOCABULARY,
    Model,
    batch,
    cut,
    one_pass,
    vision_language,
)
from tests.unit.models.videos import text_to_video

LAYOUT = cut(2, vision=[2, 1], language=[2, 1, 1, 1])


@pytest.fixture(scope="module")
def model(one_process) -> Model:
    return Model(vision_language(), LAYOUT, ProcessGroupCollection.use_mpu_process_groups())


def test_image_embeddings_stand_where_their_tokens_stand():
    tokens = torch.tensor([[1, 9, 9, 2, 9], [9, 3, 9, 9, 4]])
    embedded = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    passes = [torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 1, 3, dtype=torch.float64)]
    for one in passes:
        one.requires_grad_(True)
    placed = place_image_embeddings(embedded, tokens == 9, passes)
    first, second = passes
    expected = embedded.detach().clone()
    rows = [first[0, 0], first[1, 0], first[0, 1], first[1, 1], second[0, 0], second[1, 0]]
    for (sample, position), row in zip((tokens == 9).nonzero().tolist(), rows, strict=True):
        expected[position, sample] = row.detach()
    assert torch.equal(placed, expected)

    weight = torch.randn_like(placed)
    placed.backward(weight)
    assert torch.equal(first.grad[1, 0], weight[2, 0])
    assert torch.equal(first.grad[0, 1], weight[4, 0])
    assert torch.equal(second.grad[1, 0], weight[3, 1])
    is_text = (tokens != 9).transpose(0, 1)
    assert torch.equal(embedded.grad, weight * is_text.unsqueeze(-1))


@pytest.mark.parametrize("images", [[], [torch.zeros(2, 1, 3)], [torch.zeros(2, 2, 3)] * 2])
def test_as_many_embeddings_as_positions(images):
    is_image = torch.tensor([[True, True, False, True]])
    with pytest.raises(ConfigError, match="3 image positions"):
        place_image_embeddings(torch.zeros(4, 1, 3), is_image, images)


@pytest.mark.parametrize("images", [3, 5])
@pytest.mark.parametrize("sub_microbatch", [1, 2, 4])
def test_sub_microbatches_are_one_microbatch(model, images, sub_microbatch):
    microbatch = batch(images, samples=2, seed=images)
    expected = model.loss(microbatch)
    for chunk in model.chunks:
        chunk.zero_grad()
    expected.backward()
    gradients = {name: one.clone() for name, one in model.gradients().items()}
    for chunk in model.chunks:
        chunk.zero_grad()
    found = model.loss(microbatch, sub_microbatch)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for name, one in model.gradients().items():
        torch.testing.assert_close(one, gradients[name], rtol=1e-6, atol=1e-8, msg=name)


def test_every_image_counts_where_it_stands(model):
    microbatch = batch(2)
    swapped = {**microbatch, "images": microbatch["images"].flip(0)}
    assert not torch.equal(model.run(microbatch), model.run(swapped))


def test_squares_of_patches_become_one_token():
    patches = torch.arange(16.0).view(16, 1, 1) + torch.tensor([0.0, 100.0]).view(1, 2, 1)
    folded = fold_patches(patches, 4)
    assert folded.shape == (4, 2, 4)
    squares = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert folded[:, 0].tolist() == squares
    assert folded[:, 1].tolist() == [[100 + one for one in square] for square in squares]


def test_folded_patches_fill_fewer_positions(groups):
    spec = vision_language()
    vision = replace(spec.modules[0], patches_per_token=4)
    model = Model(replace(spec, modules=(vision, spec.backbone)), LAYOUT, groups)
    microbatch = batch(3, samples=2)
    tokens = [[IMAGE, IMAGE, 1, 2], [3, IMAGE, 4, 5]]
    microbatch |= {"tokens": torch.tensor(tokens), "labels": torch.zeros(2, 4, dtype=torch.int64)}
    losses = model.run(microbatch, 2)
    assert losses.shape == (2, 4)
    torch.testing.assert_close(model.run(microbatch, 3), losses, rtol=1e-7, atol=1e-7)
    microbatch["images"][2, ..., 3, 3] += 1.0
    changed = model.run(microbatch)
    torch.testing.assert_close(changed[0], losses[0])
    assert not torch.allclose(changed[1], losses[1])


class OnTheHost:
    """Images that cannot be moved as a whole."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, items):
        return self.images[items]


def test_a_pass_takes_its_own_images_to_the_device_alone(model):
    images = batch(5)["images"]
    first = model.stages("vision")[0]
    found = []
    for one in (images, OnTheHost(images)):
        first.set_pass(one_pass("vision", 1, 3))
        found.append(first({"images": one}))
    assert found[0].shape[1] == 2
    assert torch.equal(*found)


def test_patches_attend_to_later_patches(model):
    vision = model.stages("vision")[0]
    images = batch(1)["images"]
    changed = images.clone()
    changed[..., 2:, 2:] += 1.0  # the last patch alone
    first, second = vision({"images": images}), vision({"images": changed})
    assert not torch.equal(first[0], second[0])


def test_tokens_do_not_attend_to_later_tokens(model):
    microbatch = batch(0)
    changed = {**microbatch, "tokens": microbatch["tokens"].clone()}
    changed["tokens"][0, -1] = (changed["tokens"][0, -1] + 1) % VOCABULARY
    first, second = model.run(microbatch), model.run(changed)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


def test_given_masks_and_positions_are_used(model):
    microbatch = batch(0)
    length = microbatch["tokens"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length)[None]
    given = {**microbatch, "attention_mask": causal, "position_ids": positions}
    assert torch.equal(model.run(given), model.run(microbatch))
    documents = causal.clone()
    documents[..., 4:, :4] = True
    apart = model.run({**given, "attention_mask": documents})
    assert torch.equal(apart[:, :4], model.run(given)[:, :4])
    assert not torch.equal(apart[:, 4:], model.run(given)[:, 4:])


def test_packed_documents_are_what_each_is_alone(model):
    first, second = batch(2, seed=1), batch(1, seed=2)
    sizes = [one["tokens"].shape[1] for one in (first, second)]
    packed = {
        name: torch.cat([first[name], second[name]], 0 if name == "images" else 1) for name in first
    }
    packed["position_ids"] = torch.cat([torch.arange(size) for size in sizes])[None]
    packed["cu_seqlens"] = torch.tensor([0, *sizes]).cumsum(0).int()
    losses = model.run(packed)
    for one, found in zip((first, second), losses.split(sizes, 1), strict=True):
        torch.testing.assert_close(found, model.run(one), rtol=1e-7, atol=1e-7)


def test_packed_documents_under_a_window_are_refused_instead_of_seeing_each_other(groups):
    options = replace(OPTIONS, overrides={"language": {"window_size": (2, 0)}})
    model = Model(vision_language(), LAYOUT, groups, options)
    microbatch = batch(1)
    assert model.run(microbatch).isfinite().all()
    packed = {**microbatch, "cu_seqlens": torch.tensor([0, 3, microbatch["tokens"].shape[1]]).int()}
    with pytest.raises(ConfigError, match="documents would see each other"):
        model.run(packed)


ROTARY = {
    "rotary_percent": 0.5,
    "rotary_base": 500,
    "rotary_interpolation": 2.0,
    "rope_scaling_factor": 4.0,
}


def test_rotary_embeddings_are_those_of_the_options(groups):
    known = {name: ROTARY[name] for name in ("rotary_percent", "rotary_base")}
    expected = RotaryEmbedding(
        6,
        **known,
        seq_len_interpolation_factor=2.0,
        rope_scaling=True,
        rope_scaling_factor=4.0,
        use_cpu_initialization=True,
    )
    spec, options = vision_language(), replace(OPTIONS, **ROTARY)
    model = Model(spec, LAYOUT, groups, options)
    text = text_to_video(projected=False).modules[0]
    heads = replace(text, hidden_size=12, output_size=None)
    (video,) = text_to_video(projected=False).modules[1:]
    clips = ModelSpec(name="clips", modules=(heads, video))
    encoder = Model(clips, cut(1, text=[2], video=[3]), groups, options).stages("text")[0]
    for found in (model.stages("language")[0].language_model, encoder.text_model):
        assert torch.equal(found.rotary_pos_emb(9), expected(9))
        assert torch.equal(found.rotary_pos_emb.inv_freq, expected.inv_freq)


@pytest.mark.parametrize("percent", [0.0, 1.5])
def test_a_share_of_channels_that_is_none_is_refused(percent):
    with pytest.raises(ConfigError, match="need 0 < share <= 1"):
        replace(OPTIONS, rotary_percent=percent)


def test_logits_where_there_are_no_labels(model):
    microbatch = batch(1)
    losses = model.run(microbatch)
    labels = microbatch.pop("labels")
    logits = model.run(microbatch)
    assert logits.shape == (*labels.shape, VOCABULARY)
    expected = torch.nn.functional.cross_entropy(logits[0].float(), labels[0], reduction="none")
    torch.testing.assert_close(losses[0], expected)


def test_outputs_are_no_views_and_have_the_stated_shapes(model):
    microbatch = batch(3, samples=2)
    samples, length = microbatch["tokens"].shape
    features = None
    for chunk, width in zip(model.stages("vision"), (8, 12), strict=True):
        chunk.set_pass(one_pass("vision", 0, 3))
        chunk.set_input_tensor(features)
        features = chunk(microbatch)
        assert features.shape == (TOKENS_PER_IMAGE, 3, width)
        assert features._base is None
    hidden = [features]
    for chunk in model.stages("language")[:-1]:
        chunk.set_input_tensor(hidden)
        output = chunk(microbatch)
        assert output.shape == (length, samples, 12)
        assert output._base is None
        hidden = [output]


def test_what_was_set_holds_for_one_forward(model):
    microbatch = batch(3)
    first, second = model.stages("vision")
    first.set_pass(one_pass("vision", 1, 2))
    part, whole = first(microbatch), first(microbatch)
    assert part.shape[1] == 1
    torch.testing.assert_close(part, whole[:, 1:2], rtol=1e-12, atol=1e-12)
    second.set_input_tensor([whole])
    second(microbatch)
    with pytest.raises(ConfigError, match="vision1: got 0 input tensors"):
        second(microbatch)


def test_misuse_is_refused_by_name(model):
    vision, language = model.stages("vision")[0], model.stages("language")[0]
    with pytest.raises(ConfigError, match="vision0: the microbatch has no 'images'"):
        vision({})
    with pytest.raises(ConfigError, match="is of another module"):
        language.set_pass(one_pass("vision", 0, 1))
    with pytest.raises(ConfigError, match="0 of them and the tokens have 4 image positions"):
        language(batch(1))


def test_image_tokens_need_no_place_in_the_vocabulary(model):
    assert IMAGE >= VOCABULARY
    embedding = model.stages("language")[0].shared_embedding_or_output_weight()
    for chunk in model.chunks:
        chunk.zero_grad()
    microbatch = batch(2)
    microbatch["tokens"][microbatch["tokens"] == 0] = 1
    model.loss(microbatch).backward()
    assert embedding.grad[0].abs().max() == 0
    assert embedding.grad[1:].abs().max() > 0
