"""Split backwards on tensor-parallel ranks, with sequence parallelism and without."""

from __future__ import annotations

from dataclasses import replace

import torch
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
from tests.unit.models.examples import OPTIONS, batch, cut, language_only


def split_against_unsplit(ctx: RankContext) -> list[tuple[int, int]]:
    norm = Patch(WrappedTorchNorm, "__new__", sharded_norm_hook(WrappedTorchNorm.__new__))
    with PatchSet([*cpu_patches(), norm]):
        parallel_state.initialize_model_parallel(ctx.size)
        model_parallel_cuda_manual_seed(1)
        counts = [compare(ctx.size, sequence_parallel) for sequence_parallel in (False, True)]
        parallel_state.destroy_model_parallel()
    return counts


def compare(tensor_parallel_size: int, sequence_parallel: bool) -> tuple[int, int]:
    """Gradients of two microbatches, split and not.

    Returns:
        How many tensors are held for W, and how many parameters have no gradient by then.
    """
    backbone = replace(language_only(layers=2).backbone, kv_groups=2)
    common = {
        **OPTIONS.common,
        "tensor_model_parallel_size": tensor_parallel_size,
        "sequence_parallel": sequence_parallel,
    }
    (chunk,) = build_chunks(
        ModelSpec(name="text", modules=(backbone,)),
        cut(1, language=(2,)),
        replace(OPTIONS, common=common),
        pg_collection=compat.default_pg_collection(),
    )
    gradients: dict[bool, dict[str, Tensor]] = {}
    counts = []
    for split in (False, True):
        chunk.zero_grad()
        for seed in range(2):
            with chunk.weight_gradients.leaving_out(split) as left:
                loss = chunk(batch(0, text=8, seed=seed)).sum()
            loss.backward()
            missing = sum(one.grad is None for one in chunk.parameters())
            counts.append((sum(1 for _ in left.tensors()), missing))
            left.finish()
        gradients[split] = {name: one.grad.clone() for name, one in global_parameters([chunk])}
    for name, whole in gradients[False].items():
        assert torch.equal(gradients[True][name], whole), name
        assert whole.any(), name
    return counts[2]


def test_two_tensor_parallel_ranks_split_as_they_do_not() -> None:
    per_rank = run_on_ranks(split_against_unsplit, 2)
    # Two layers of four linears, and the output layer.
    assert per_rank == [[(2 * 9, 9)] * 2] * 2
