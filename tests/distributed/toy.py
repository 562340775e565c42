"""A toy multimodal model in fp64: chunks for the executor, and the same model in one process.

Every stage is ``tanh(x W + b)``. Stage 0 makes its own rows from the pass's identity and adds the
mean row of every input; the last stage appends a mean row (so that outputs and hidden states
differ in shape). The loss is the mean square of what nobody consumes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.ir.plan import Plan, PlanPass, VerifiedPlan
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey
from megatron_pipeweaver.runtime.stage import ModuleStages
from tests.unit.compiler.samples import WIDTH, draw_sample

Chunks = dict[tuple[str, int], nn.Module]


class Chunk(nn.Module):
    def __init__(self, module: str, stage: int, stages: int, trained: bool) -> None:
        super().__init__()
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        rng = torch.Generator().manual_seed(zlib.crc32(f"{module}/{stage}".encode()))
        for name, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,))):
            value = torch.randn(shape, generator=rng, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value, requires_grad=trained))

    def forward(self, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.is_first:
            hidden = _rows(one)
            for each in inputs:
                hidden = hidden + each.mean(0)
        else:
            (hidden,) = inputs
        hidden = torch.tanh(hidden @ self.weight + self.bias)
        return torch.cat([hidden, hidden.mean(0, keepdim=True)]) if self.is_last else hidden


def _rows(one: PlanPass) -> Tensor:
    rng = torch.Generator().manual_seed(zlib.crc32(repr(one.key).encode()))
    items = one.payload.item_stop - one.payload.item_start
    return torch.randn(items, WIDTH, generator=rng, dtype=torch.float64)


def loss_of(one: PlanPass, output: Tensor) -> Tensor:
    return output.square().mean() * (1 + one.key.microbatch)


def build_chunks(plan: Plan, rank: int | None = None) -> Chunks:
    """All chunks of `plan`'s model, or one rank's; equal wherever they are built."""
    size = plan.pipeline_size
    frozen = {one.key.module for one in plan.passes if one.frozen}
    return {
        (module, stage): Chunk(module, stage, size * segments, module not in frozen)
        for module, segments in plan.modules.items()
        for stage in range(size * segments)
        if rank is None or stage % size == rank
    }


def draw_plan(seed: int, *, forward_only: bool = False, **shape: int) -> VerifiedPlan:
    """A random plan whose stages sum up gradients in the order of microbatches."""
    rng = random.Random(seed)
    sample = draw_sample(rng, ordered=True, **shape)
    return verify(sample.plan(forward_only=forward_only))


def gradients(chunks: Chunks) -> dict[tuple[str, int, str], Tensor]:
    return {
        (*key, name): weight.grad
        for key, chunk in chunks.items()
        for name, weight in chunk.named_parameters()
        if weight.grad is not None
    }


def run_in_one_process(
    plan: Plan,
) -> tuple[dict[PassKey, Tensor], dict[tuple[str, int, str], Tensor]]:
    """Losses and gradients, microbatch by microbatch, by plain autograd within each pass."""
    chunks = build_chunks(plan)
    losses: dict[PassKey, Tensor] = {}
    names = list(plan.modules)
    for microbatch in sorted({one.key.microbatch for one in plan.passes}):
        passes = [one for one in plan.passes if one.key.microbatch == microbatch]
        passes.sort(key=lambda one: (names.index(one.key.module), one.key.sub_microbatch))
        _run_microbatch(plan, passes, chunks, losses)
    for chunk in chunks.values():
        for weight in chunk.parameters():
            if weight.requires_grad and weight.grad is None and not plan.forward_only:
                weight.grad = torch.zeros_like(weight)
    return losses, gradients(chunks)


def _run_microbatch(
    plan: Plan, passes: list[PlanPass], chunks: Chunks, losses: dict[PassKey, Tensor]
) -> None:
    consumed = {producer for one in passes for producer in one.after}
    outputs: dict[PassKey, Tensor] = {}
    leaves: dict[PassKey, dict[PassKey, Tensor]] = {}
    for one in passes:
        leaves[one.key] = {
            producer: outputs[producer].detach().requires_grad_() for producer in one.after
        }
        hidden: tuple[Tensor, ...] = tuple(leaves[one.key].values())
        for stage in range(one.stages):
            op = OpKey(OpKind.F, *one.key, stage)
            hidden = (chunks[one.key.module, stage](one, op, hidden),)
        outputs[one.key] = hidden[0]
        if one.key not in consumed:
            outputs[one.key] = loss_of(one, hidden[0])
            losses[one.key] = outputs[one.key].detach()
    if plan.forward_only:
        return
    backward: Mapping[str, list[PlanPass]] = {
        name: [one for one in passes if one.key.module == name] for name in reversed(plan.modules)
    }
    for group in backward.values():
        for one in group:
            if one.frozen:
                continue
            if one.key not in consumed:
                outputs[one.key].backward()
                continue
            grads = [
                _or_zeros(consumer_leaves[one.key])
                for key, consumer_leaves in leaves.items()
                if one.key in consumer_leaves and not _is_frozen(plan, key)
            ]
            if grads:
                outputs[one.key].backward(sum(grads[1:], grads[0]))


def _or_zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _is_frozen(plan: Plan, key: PassKey) -> bool:
    return next(one.frozen for one in plan.passes if one.key == key)


def stages_of(plan: Plan, rank: int) -> tuple[ModuleStages, Chunks]:
    chunks = build_chunks(plan, rank)
    return ModuleStages(plan, chunks, loss_of), chunks
