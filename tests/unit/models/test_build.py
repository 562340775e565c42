from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind
from megatron_pipeweaver.models.build import PipelinePosition, build_chunks, groups_of_rank
from megatron_pipeweaver.models.parameters import global_parameters
from megatron_pipeweaver.plugin.compat import finalize_order
from tests.unit.models.examples import OPTIONS, Model, batch, cut, vision_language

WHOLE = cut(1, vision=[3], language=[5])

CUTS = {
    "two ranks": cut(2, vision=[2, 1], language=[2, 3]),
    "K 2 and 1": cut(2, vision=[1, 1, 1, 0], language=[3, 2]),
    "K 1 and 3": cut(2, vision=[1, 2], language=[0, 1, 1, 2, 1, 0]),
    "four ranks, empty chunks": cut(4, vision=[0, 3, 0, 0], language=[0, 1, 2, 1, 0, 0, 1, 0]),
    "three ranks": cut(3, vision=[1, 1, 1], language=[2, 2, 1]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_is_the_same_model(groups, name, tied):
    spec = vision_language(tied=tied)
    whole, parts = Model(spec, WHOLE, groups), Model(spec, CUTS[name], groups)
    for images, seed in ((3, 1), (0, 2)):
        microbatch = batch(images, samples=2, seed=seed)
        expected, found = whole.loss(microbatch), parts.loss(microbatch)
        assert torch.equal(found, expected)
        expected.backward()
        found.backward()
    expected, found = whole.gradients(), parts.gradients()
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12, msg=key)
        assert gradient.dtype == torch.float64
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_has_the_same_parameters(groups, name, tied):
    spec = vision_language(tied=tied)
    whole = dict(global_parameters(Model(spec, WHOLE, groups).chunks))
    parts = Model(spec, CUTS[name], groups)
    found = list(global_parameters(parts.chunks))
    copies = {"language_model.output_layer.weight"} if tied else set()
    assert {key for key, _ in found} - copies == set(whole)
    assert len(found) == len(whole) + len(copies)
    for key, parameter in found:
        source = key.replace("output_layer", "embedding.word_embeddings") if tied else key
        assert torch.equal(parameter, whole[source]), key
        assert parameter.dtype == torch.float64


def test_layer_numbers_count_from_the_module_start(groups):
    layout = cut(2, vision=[1, 1, 1, 0], language=[2, 3])
    model = Model(vision_language(), layout, groups)
    for module, layers in (("vision", 3), ("language", 5)):
        numbers = [layer.layer_number for chunk in model.stages(module) for layer in chunk.layers]
        assert numbers == list(range(1, layers + 1))


def test_all_chunks_of_a_rank_share_one_root_config(groups):
    chunks = Model(vision_language(), CUTS["K 1 and 3"], groups).ranks[0]
    root = get_model_config(chunks[0])
    assert all(get_model_config(chunk) is root for chunk in chunks)
    assert root.pipeline_model_parallel_size == 2
    assert root.virtual_pipeline_model_parallel_size == 4
    assert root.hidden_size == 12
    inner = [chunk.layers[0].config for chunk in chunks if chunk.layers]
    assert root not in inner
    assert root.deallocate_pipeline_outputs
    assert root.pipeline_dtype == torch.float64


@pytest.mark.parametrize("rank", range(24))
def test_bookkeeping_of_24_ranks(groups, rank):
    layout = cut(24, vision=[1] * 23 + [0] + [0, 1] * 12, language=[2] * 24)
    spec = vision_language(vision_layers=35, language_layers=48)
    chunks = build_chunks(spec, layout, OPTIONS, pg_collection=groups, rank=rank)
    assert [chunk.place for chunk in chunks] == list(layout.chunks_of_rank(rank))
    assert [chunk.vp_stage for chunk in chunks] == [0, 1, 2]
    assert [len(chunk.layers) for chunk in chunks] == [chunk.place.layers for chunk in chunks]
    for chunk in chunks:
        first = chunk.place.first_layer
        numbers = [layer.layer_number for layer in chunk.layers]
        assert numbers == list(range(first + 1, first + chunk.place.layers + 1))
    assert [chunk.pre_process for chunk in chunks] == [rank == 0, False, False]
    assert [chunk.post_process for chunk in chunks] == [False, False, rank == 23]
    assert [chunk.embeds_tokens for chunk in chunks] == [False, False, rank == 0]
    names = {name.split(".")[0] for name, _ in global_parameters(chunks)}
    assert ("vision_projection" in names) == (rank == 23)
    assert all(chunk.pg_collection.pp.rank() == rank for chunk in chunks)


def test_finalize_order_of_real_chunks(groups):
    parts = Model(vision_language(tied=True), CUTS["K 1 and 3"], groups)
    first, last = (finalize_order(rank) for rank in parts.ranks)
    assert first[0].shared_embedding_or_output_weight() is not None
    assert first[0].pre_process is False
    assert last[-1].shared_embedding_or_output_weight() is not None
    assert [chunk.vp_stage for chunk in last] == [0, 1, 2, 3]
    holders = [
        chunk for chunk in parts.chunks if chunk.shared_embedding_or_output_weight() is not None
    ]
    assert holders == [first[0], last[-1]]


def test_wrapped_in_ddp_even_without_parameters(groups):
    parts = Model(vision_language(), CUTS["four ranks, empty chunks"], groups)
    config = DistributedDataParallelConfig(overlap_grad_reduce=True)
    empty = [chunk for chunk in parts.chunks if not list(chunk.parameters())]
    assert empty
    for chunk in parts.ranks[0]:
        chunk.to(torch.float32)
        wrapped = DistributedDataParallel(chunk.config, config, chunk)
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            pass
        wrapped.start_grad_sync()
        wrapped.finish_grad_sync()


def test_frozen_module_has_no_gradients(groups):
    model = Model(vision_language(frozen=True), CUTS["two ranks"], groups)
    model.loss(batch(2)).backward()
    assert {name.split(".")[0] for name in model.gradients()} == {"language_model"}


def test_options_reach_megatrons_config(groups):
    options = replace(
        OPTIONS,
        dropout=0.25,
        common={"init_method_std": 0.1, "layernorm_epsilon": 1e-3},
        overrides={"vision": {"layernorm_epsilon": 1e-6}, "language": {"add_bias_linear": False}},
    )
    model = Model(vision_language(), WHOLE, groups, options)
    vision, language = (model.stages(name)[0].layers[0] for name in ("vision", "language"))
    assert (vision.config.layernorm_epsilon, language.config.layernorm_epsilon) == (1e-6, 1e-3)
    assert (vision.config.hidden_dropout, language.config.attention_dropout) == (0.25, 0.25)
    assert vision.mlp.linear_fc1.bias is not None
    assert language.mlp.linear_fc1.bias is None
    unknown = replace(OPTIONS, overrides={"vision": {"no_such_field": 1}})
    with pytest.raises(ConfigError, match=r"'vision'.*no_such_field"):
        Model(vision_language(), WHOLE, groups, unknown)


def test_what_megatron_refuses_says_of_which_module(groups):
    common = {**OPTIONS.common, "tensor_model_parallel_size": 4}
    with pytest.raises(ConfigError, match=r"'language': .*num_attention_heads"):
        Model(vision_language(), WHOLE, groups, replace(OPTIONS, common=common))


def test_job_and_layout_must_agree(groups):
    with pytest.raises(ConfigError, match="layout is for 2 pipeline ranks and this job has 1"):
        build_chunks(vision_language(), CUTS["two ranks"], OPTIONS, pg_collection=groups)
    assert len(build_chunks(vision_language(), WHOLE, OPTIONS, pg_collection=groups)) == 2


def test_groups_of_another_rank_do_not_communicate():
    real = SimpleNamespace(pp="pp", tp="tp", embd="embd", pos_embd="pos_embd")
    groups = groups_of_rank(real, 3, 8)
    assert (groups.pp, groups.tp, groups.embd) == (PipelinePosition(3, 8), "tp", None)
    assert (groups.pp.rank(), groups.pp.size()) == (3, 8)
    assert real.pp == "pp"


def one_module(spec: ModelSpec, name: str, **changes: object) -> ModelSpec:
    modules = tuple(
        replace(module, **changes) if module.name == name else module for module in spec.modules
    )
    return ModelSpec(name=spec.name, modules=modules)


@pytest.mark.parametrize(
    ("spec", "layout", "message"),
    [
        (vision_language(), cut(1, language=[5]), "layout's modules"),
        (vision_language(), cut(1, vision=[2], language=[5]), "3 layers, and 2 in its cut"),
        (vision_language(), cut(1, vision=[3], language=[2, 3]), "2 segments on one"),
        (
            one_module(vision_language(), "vision", output_size=16),
            WHOLE,
            "'vision': hands on 16 and 'language' takes 12",
        ),
        (one_module(vision_language(), "vision", kind=ModuleKind.TEXT), WHOLE, "kind 'text'"),
        (
            one_module(vision_language(), "language", kind=ModuleKind.DIFFUSION),
            WHOLE,
            "a diffusion backbone is fed by modules of kind 'text'",
        ),
        (one_module(vision_language(), "language", vocab_size=None), WHOLE, "vocab_size"),
        (one_module(vision_language(), "vision", patch_size=3), WHOLE, "patch_size 3"),
        (one_module(vision_language(), "vision", patches_per_token=3), WHOLE, "3 is no square"),
        (
            one_module(
                vision_language(),
                "vision",
                hidden_size=12,
                layer=LayerOptions(rotary=True),
            ),
            WHOLE,
            "heads are 6 wide",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(groups, spec: ModelSpec, layout: ChunkLayout, message):
    with pytest.raises(ConfigError, match=message):
        build_chunks(spec, layout, OPTIONS, pg_collection=groups, rank=0)


def test_text_only_model(groups):
    language = replace(vision_language().backbone, after=())
    spec = ModelSpec(name="text", modules=(language,))
    whole = Model(spec, cut(1, language=[5]), groups)
    parts = Model(spec, cut(2, language=[2, 1, 0, 2]), groups)
    microbatch = batch(0, samples=3)
    assert torch.equal(parts.loss(microbatch), whole.loss(microbatch))
    assert parts.ranks[0][0].pre_process
    assert parts.ranks[0][0].embeds_tokens


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_has_the_same_checkpoint_keys(groups, name, tied):
    def shards(model: Model) -> set[tuple[object, ...]]:
        return {
            (one.key, one.global_shape, one.global_offset)
            for chunk in model.chunks
            for one in chunk.sharded_state_dict().values()
            if isinstance(one, ShardedTensor)
        }

    spec = vision_language(tied=tied)
    found, expected = shards(Model(spec, CUTS[name], groups)), shards(Model(spec, WHOLE, groups))
    assert found == expected
    assert {key.split(".")[0] for key, *_ in found} == {
        "vision_model",
        "vision_projection",
        "language_model",
    }


def test_bfloat16(groups):
    options = replace(OPTIONS, params_dtype=torch.bfloat16)
    model = Model(vision_language(), CUTS["two ranks"], groups, options)
    losses = model.run(batch(2))
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    assert {gradient.dtype for gradient in model.gradients().values()} == {torch.bfloat16}


def test_queries_and_keys_of_a_language_model_are_normed(groups):
    spec = vision_language()
    vision, language = spec.modules
    language = replace(language, layer=replace(language.layer, qk_norm=True))
    model = Model(
        replace(spec, modules=(vision, language)), cut(1, vision=[3], language=[5]), groups
    )
    model.loss(batch(1)).backward()
    ends = ("q_layernorm.weight", "k_layernorm.weight")
    assert sum(name.endswith(ends) for name in model.gradients()) == 2 * 5
