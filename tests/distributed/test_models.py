"""Chunks in a real pipeline of two ranks: tied embeddings are one weight, whatever is beside."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from tests.distributed.harness import RankContext, run_on_ranks


def _tied(ctx: RankContext) -> tuple[float, float, list[int]]:
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_pipeweaver.models.build import build_chunks
    from megatron_pipeweaver.plugin import compat
    from megatron_pipeweaver.plugin.cpu import cpu_patches
    from megatron_pipeweaver.plugin.patching import PatchSet
    from tests.unit.models.examples import OPTIONS, cut, vision_language

    with PatchSet(cpu_patches()):
        parallel_state.initialize_model_parallel(1, 2, 3)
        model_parallel_cuda_manual_seed(1 + ctx.rank)
        ctx.note("building, which sums the tied embeddings")
        chunks = build_chunks(
            vision_language(tied=True),
            cut(2, vision=[2, 1], language=[1, 1, 2, 1]),
            replace(OPTIONS, params_dtype=torch.float32, initialize=None),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        held = [one.shared_embedding_or_output_weight() for one in chunks]
        holders = [index for index, one in enumerate(held) if one is not None]
        weight = held[holders[0]]
        assert weight is not None
        others = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(others, weight.detach())
        difference = float((others[0] - others[1]).abs().max()) if weight.abs().max() else -1.0

        ddp = DistributedDataParallelConfig(overlap_grad_reduce=True)
        model = [DistributedDataParallel(chunks[0].config, ddp, chunk) for chunk in chunks]
        for chunk in model:
            chunk.zero_grad_buffer()
        weight.main_grad.fill_(1.0 + ctx.rank)
        for chunk in model:
            chunk.start_grad_sync()
        ctx.note("finalising, which sums the tied embeddings' gradients")
        finalize_model_grads(
            compat.finalize_order(model), pg_collection=compat.default_pg_collection()
        )
        gradient = float(weight.main_grad.unique())
        parallel_state.destroy_model_parallel()
    return difference, gradient, holders


def test_tied_embeddings_are_one_weight() -> None:
    first, last = run_on_ranks(_tied, 2)
    assert first == (0.0, 3.0, [1])
    assert last == (0.0, 3.0, [2])
