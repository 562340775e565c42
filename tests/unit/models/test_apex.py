"""Megatron's own linears where Apex's kernels add weight gradients into `main_grad`."""

from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.options import ModelOptions
from tests.unit.models import apex
from tests.unit.models.examples import OPTIONS, batch, cut, language_only

LAYERS = 2
FUSED = {**OPTIONS.common, "gradient_accumulation_fusion": True}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex.kernels(), raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)


def main_grads(groups, dtype: torch.dtype, *, in_fp32: bool, fused: bool, split: bool, late: bool):
    """What two microbatches leave in the gradient buffer; of a split, the second one's `W` first.

    Args:
        late: reducing begins with a call behind both, not with the last gradient.
    """
    options: ModelOptions = replace(
        OPTIONS, params_dtype=dtype, common=FUSED if fused else OPTIONS.common
    )
    (chunk,) = build_chunks(
        language_only(layers=LAYERS), cut(1, language=(LAYERS,)), options, pg_collection=groups
    )
    config = DistributedDataParallelConfig(
        overlap_grad_reduce=True, grad_reduce_in_fp32=in_fp32, bucket_size=500
    )
    model = DistributedDataParallel(chunk.config, config, chunk)
    model.zero_grad_buffer()
    left = []
    with model.no_sync():
        for seed in range(2):
            with chunk.weight_gradients.leaving_out(split) as one:
                loss = chunk(batch(0, seed=seed)).float().sum()
            left.append(one)
            if seed == 0 or late:
                loss.backward()
        for one in left[: 2 if late else 1][::-1]:
            one.finish()
    if late:
        model.start_grad_sync()
    else:
        loss.backward()
        left[1].finish()
    model.finish_grad_sync()
    assert all(one.grad is None for one in chunk.parameters())
    return {name: one.main_grad for name, one in chunk.named_parameters()}


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("dtype", "in_fp32"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16 into fp32", "bf16"],
)
def test_split_and_fused_gradients_are_those_of_one_piece(groups, dtype, in_fp32, late):
    kinds = {"dtype": dtype, "in_fp32": in_fp32, "late": late}
    whole = main_grads(groups, **kinds, fused=True, split=False)
    apart = main_grads(groups, **kinds, fused=True, split=True)
    assert whole.keys() == apart.keys()
    for name, one in whole.items():
        assert one.any(), name
        assert torch.equal(apart[name], one), name


def test_the_kernels_are_what_adds(groups, monkeypatch):
    """In ``W`` every linear that was left out calls one, and in ``B`` none does."""
    kernels, calls = apex.kernels(), []
    add = kernels.wgrad_gemm_accum_fp32
    monkeypatch.setattr(
        kernels, "wgrad_gemm_accum_fp32", lambda *given: (calls.append(phase), add(*given))
    )
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels)
    options = replace(OPTIONS, params_dtype=torch.float32, common=FUSED)
    (chunk,) = build_chunks(
        language_only(layers=LAYERS), cut(1, language=(LAYERS,)), options, pg_collection=groups
    )
    for one in chunk.parameters():
        one.main_grad = torch.zeros_like(one)
    with chunk.weight_gradients.leaving_out(True) as left:
        loss = chunk(batch(0)).sum()
    phase = "B"
    loss.backward()
    assert not calls
    phase = "W"
    left.finish()
    assert calls == ["W"] * (4 * LAYERS + 1)


def test_a_gradient_buffer_that_no_kernel_adds_to_is_refused(groups):
    options = replace(OPTIONS, common=FUSED)  # fp64
    (chunk,) = build_chunks(
        language_only(layers=1), cut(1, language=(1,)), options, pg_collection=groups
    )
    for one in chunk.parameters():
        one.main_grad = torch.zeros_like(one)
    with chunk.weight_gradients.leaving_out(True) as left:
        loss = chunk(batch(0)).sum()
    loss.backward()
    with pytest.raises(ConfigError, match="give --no-gradient-accumulation-fusion"):
        left.finish()
