"""Chunks of Transformer Engine's layers, where single forwards put their weight gradients off.

Run by `test_transformer_engine.py` in a process of its own, for Megatron decides while it is
imported whether Transformer Engine is there. Over what `engine.py` says, Megatron's classes, DDP
and everything else are the real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from torch import Tensor

from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.delayed import can_delay
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.weight_grad import LeftOut
from megatron_pipeweaver.runtime.offload import HostOffload
from tests.unit.models.examples import OPTIONS, batch, cut, language_only, vision_language

ENGINE = replace(OPTIONS, transformer_engine=True)
FUSED = replace(
    ENGINE,
    params_dtype=torch.float32,
    common={**OPTIONS.common, "gradient_accumulation_fusion": True},
)
LAYERS, LINEARS = 2, 4
Gradients = dict[str, Tensor]


def language(
    groups: Any, options: ModelOptions = ENGINE, *, tied: bool = False, layers: int = LAYERS
) -> ModelChunk:
    (backbone,) = language_only(layers=layers).modules
    spec = ModelSpec(name="text", modules=(replace(backbone, tied_embeddings=tied),))
    (chunk,) = build_chunks(spec, cut(1, language=(layers,)), options, pg_collection=groups)
    return chunk


def forward(chunk: ModelChunk, seed: int, *, split: bool) -> tuple[Tensor, LeftOut]:
    """The loss of one microbatch, and what its backward will leave out."""
    microbatch = batch(0, seed=seed)
    with chunk.weight_gradients.leaving_out(split) as left:
        loss = chunk(microbatch)
    return (loss * microbatch["loss_mask"].to(loss.dtype)).sum(), left


def run(
    chunk: ModelChunk, split: Sequence[bool], backward: Sequence[int], weights: Sequence[int]
) -> Gradients:
    """Gradients behind one forward each, their backwards and their ``W`` in these orders."""
    chunk.zero_grad()
    passes = [forward(chunk, seed, split=one) for seed, one in enumerate(split)]
    for index in backward:
        passes[index][0].backward()
        if not split[index]:
            assert not list(passes[index][1].tensors())
            passes[index][1].finish()
    for index in weights:
        assert list(passes[index][1].tensors())
        passes[index][1].finish()
    return gradients(chunk)


def gradients(chunk: torch.nn.Module) -> Gradients:
    return {
        name: one.grad.clone() for name, one in chunk.named_parameters() if one.grad is not None
    }


def assert_equal(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
        assert one.any(), name


@pytest.mark.parametrize(
    ("split", "weights"),
    [((True, True), (0, 1)), ((True, True), (1, 0)), ((True, False), (0,)), ((False, True), (1,))],
)
def test_a_pass_is_split_or_not_and_its_weight_gradients_may_wait(groups, split, weights):
    chunk = language(groups)
    whole = run(chunk, (False, False), (0, 1), ())
    # Two summands are the same sum in any order.
    assert_equal(run(chunk, split, (0, 1), weights), whole)
    assert_equal(run(chunk, split, (1, 0), weights), whole)
    assert len(whole) == len(list(chunk.parameters()))


def test_B_leaves_out_what_W_computes(groups):
    chunk = language(groups)
    loss, left = forward(chunk, 0, split=True)
    loss.backward()
    waiting = {name for name, one in chunk.named_parameters() if one.grad is None}
    # The embedding, norms and biases that others add stay in the backward; so does what comes
    # before everything else, for there is no gradient to hand on.
    assert {name.rpartition(".")[2] for name in waiting} == {"weight", "bias"}
    assert len([name for name in waiting if name.endswith("weight")]) == LAYERS * LINEARS + 1
    assert len(list(left.tensors())) == 2 * (LAYERS * LINEARS + 1)
    left.finish()
    assert not list(left.tensors())
    assert all(one.grad is not None for one in chunk.parameters())


def test_modules_stay_what_they_were(groups):
    chunk = language(groups)
    before = {name: (type(one), id(one)) for name, one in chunk.named_modules()}
    state = {name: one.clone() for name, one in chunk.state_dict().items() if one is not None}
    run(chunk, (True,), (0,), (0,))
    for name, one in chunk.named_modules():
        kind, identity = before[name]
        assert isinstance(one, kind)
        assert type(one).__name__ == kind.__name__
        assert id(one) == identity
    for name, one in chunk.state_dict().items():
        assert one is None or torch.equal(one, state[name]), name
    kinds = Counter(type(one).__name__ for one in chunk.modules())
    assert kinds[TELayerNormColumnParallelLinear.__name__] == 2 * LAYERS
    assert kinds[TERowParallelLinear.__name__] == 2 * LAYERS


@pytest.mark.parametrize(
    ("strategy", "linears"),
    [
        ("keep", 4),
        ("recompute", 0),
        ("offload", 0),
        ("recompute_attention", 4),
        ("recompute_mlp", 2),
    ],
)
def test_what_a_strategy_frees_is_not_held_for_W(groups, strategy, linears):
    chunk = language(groups)
    whole = run(chunk, (False,), (0,), ())
    chunk.zero_grad()
    chunk.set_strategy(strategy, HostOffload())
    loss, left = forward(chunk, 0, split=True)
    loss.backward()
    assert len(list(left.tensors())) == 2 * (LAYERS * linears + 1)
    left.finish()
    assert_equal(gradients(chunk), whole)


def test_tied_embeddings_add_up_before_they_are_accumulated(groups):
    chunk = language(groups, tied=True)
    whole = run(chunk, (False, False), (0, 1), ())
    assert_equal(run(chunk, (True, True), (0, 1), (1, 0)), whole)


def test_frozen_weights_get_nothing_and_cost_nothing(groups):
    chunk = language(groups)
    for name, one in chunk.named_parameters():
        one.requires_grad_("layers.0" not in name)
    whole = run(chunk, (False,), (0,), ())
    loss, left = forward(chunk, 0, split=True)
    chunk.zero_grad()
    loss.backward()
    assert len(list(left.tensors())) == 2 * (LINEARS + 1)
    left.finish()
    assert_equal(gradients(chunk), whole)


def test_a_pass_whose_backward_never_comes_leaves_nothing_behind(groups):
    chunk = language(groups)
    _, unused = forward(chunk, 3, split=True)
    chunk.zero_grad()
    unused.finish()
    assert not gradients(chunk)
    whole = run(chunk, (False,), (0,), ())
    assert_equal(run(chunk, (True,), (0,), (0,)), whole)


def test_evaluation_puts_nothing_off(groups):
    chunk = language(groups)
    with torch.no_grad():
        _, left = forward(chunk, 0, split=True)
    left.finish()
    assert not list(left.tensors())


def test_encoders_split_like_language_models_but_for_their_projector(groups):
    spec, layout = vision_language(), cut(1, vision=(3,), language=(5,))
    vision = build_chunks(spec, layout, ENGINE, pg_collection=groups)[0]
    found = []
    for split in (False, True):
        vision.zero_grad()
        with vision.weight_gradients.leaving_out(split) as left:
            features = vision(batch(2))
        features.square().sum().backward()
        # What comes first has an input of the patch embedding, whose weight is trained.
        assert len(list(left.tensors())) == 2 * 3 * LINEARS * split
        left.finish()
        found.append(gradients(vision))
    assert_equal(found[1], found[0])


# --- Megatron's DDP ------------------------------------------------------------------------------


def wrapped(chunk: ModelChunk, *, overlap: bool) -> DistributedDataParallel:
    config = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap, grad_reduce_in_fp32=False, bucket_size=500
    )
    model = DistributedDataParallel(chunk.config, config, chunk)
    model.zero_grad_buffer()
    return model


def main_grads(
    model: DistributedDataParallel, split: Sequence[bool], weights: Sequence[int], *, late: bool
) -> Gradients:
    """Like `run`, into the gradient buffer; the last pass, or (`late`) a call starts reducing."""
    chunk = model.module
    model.zero_grad_buffer()
    passes = [forward(chunk, seed, split=one) for seed, one in enumerate(split)]
    with model.no_sync():
        for loss, left in passes[: len(passes) if late else -1]:
            loss.backward()
            if left not in [passes[one][1] for one in weights]:
                left.finish()
        for index in weights[: len(weights) if late else -1]:
            passes[index][1].finish()
    if late:
        model.start_grad_sync()
    else:
        loss, left = passes[-1]
        loss.backward()
        left.finish()
    model.finish_grad_sync()
    for one in chunk.parameters():
        assert one.grad is None
    return {name: one.main_grad.clone() for name, one in chunk.named_parameters()}


@pytest.mark.parametrize("options", [ENGINE, FUSED], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    ("overlap", "late"),
    [(True, True), (True, False), (False, True)],
    ids=["overlap, no_sync", "overlap, last pass reduces", "no overlap"],
)
def test_ddp_sees_every_gradient_once_and_whole(groups, options, overlap, late):
    model = wrapped(language(groups, options), overlap=overlap)
    whole = main_grads(model, (False, False), (), late=late)
    assert_equal(main_grads(model, (True, True), (0, 1), late=late), whole)
    assert_equal(main_grads(model, (False, True), (1,), late=late), whole)
    if late:
        assert_equal(main_grads(model, (True, True), (1, 0), late=late), whole)


@pytest.mark.parametrize("split", [True, False])
def test_the_first_forward_of_a_module_does_not_overwrite_what_came_before(groups, split):
    """Transformer Engine's fused product writes the first microbatch's gradient over the others."""
    found = []
    for order in ((0, 1), (1, 0)):
        model = wrapped(language(groups, FUSED), overlap=False)  # new, so it has run no forward
        passes = [forward(model.module, seed, split=split) for seed in range(2)]
        with model.no_sync():
            for index in order:
                passes[index][0].backward()
            for index in order:
                passes[index][1].finish()
        found.append({name: one.main_grad for name, one in model.module.named_parameters()})
    assert_equal(*found)


# --- what is not put off -------------------------------------------------------------------------


def experts(groups: Any, *, fused: bool) -> TEColumnParallelGroupedLinear:
    options = FUSED if fused else ENGINE
    chunk = language(groups, options)
    return TEColumnParallelGroupedLinear(
        2,
        6,
        4,
        config=chunk.layers[0].config,
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
        pg_collection=groups,
    )


def test_experts_in_one_product_wait_only_where_they_add_to_main_grad(groups):
    """Elsewhere Transformer Engine makes room for all their gradients in ``B``."""
    assert can_delay(experts(groups, fused=True))
    assert not can_delay(experts(groups, fused=False))


def test_gathered_operands_are_not_held(groups):
    chunk = language(groups)
    linear = chunk.layers[0].mlp.linear_fc1
    assert can_delay(linear)
    linear.sequence_parallel, linear.tp_size = True, 2
    assert not can_delay(linear)


def test_products_that_overlap_with_communication_are_not_put_off(groups):
    chunk = language(groups)
    chunk.layers[0].config.tp_comm_overlap = True
    assert not can_delay(chunk.layers[0].mlp.linear_fc1)


def test_other_modules_are_not_touched(groups):
    assert not can_delay(torch.nn.Linear(2, 2))
    assert not can_delay(language(groups).layers[0])
