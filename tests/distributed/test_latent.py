"""Latent attention on tensor-parallel ranks: the gradients of one rank, keys' shared ones too."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.parameters import global_parameters
from megatron_pipeweaver.plugin import compat
from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.cpu_training import sharded_norm_hook
from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from tests.distributed.harness import RankContext, run_on_ranks
from tests.unit.models.examples import OPTIONS, batch, cut
from tests.unit.models.test_latent import LATENT, with_latent

ATTENTION = "language_model.decoder.layers.0.self_attention."
NAMES = [
    f"{ATTENTION}{name}.weight"
    for name in (
        "linear_q_down_proj",
        "linear_q_up_proj",
        "linear_kv_down_proj",
        "linear_kv_up_proj",
        "linear_proj",
    )
]


def gradients(tensor_parallel_size: int) -> dict[str, Tensor]:
    """Of the first layer's linears on all ranks, whole."""
    parallel_state.initialize_model_parallel(tensor_parallel_size)
    model_parallel_cuda_manual_seed(1)
    backbone = with_latent(replace(LATENT, kv_rank=6, query_rank=8)).backbone
    common = {
        **OPTIONS.common,
        "tensor_model_parallel_size": tensor_parallel_size,
        "sequence_parallel": tensor_parallel_size > 1,
    }
    (chunk,) = build_chunks(
        ModelSpec(name="text", modules=(replace(backbone, after=(), layers=2),)),
        cut(1, language=(2,)),
        replace(OPTIONS, common=common),
        pg_collection=compat.default_pg_collection(),
    )
    chunk(batch(0, text=8)).sum().backward()
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for name, one in global_parameters([chunk]):
        if name in NAMES:
            assert one.grad is not None
            parts = [torch.empty_like(one.grad) for _ in range(tensor_parallel_size)]
            dist.all_gather(parts, one.grad.contiguous(), group=group)
            found[name] = torch.cat(parts, one.partition_dim)  # type: ignore[attr-defined]
    parallel_state.destroy_model_parallel()
    return found


def whole_and_shared(ctx: RankContext) -> list[str]:
    norm = Patch(WrappedTorchNorm, "__new__", sharded_norm_hook(WrappedTorchNorm.__new__))
    with PatchSet([*cpu_patches(), norm]):
        whole, shared = gradients(1), gradients(ctx.size)
    for name, one in whole.items():
        # The loss over a vocabulary that is shared is computed in single precision.
        torch.testing.assert_close(shared[name], one, rtol=1e-5, atol=1e-7)
        assert one.any()
    return list(whole)


def test_two_tensor_parallel_ranks_have_the_gradients_of_one() -> None:
    for names in run_on_ranks(whole_and_shared, 2):
        assert sorted(names) == sorted(NAMES)
