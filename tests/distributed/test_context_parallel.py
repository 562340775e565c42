"""Context parallelism on gloo ranks: attention across ranks, and training of whole models."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_pipeweaver.models.build import PipelinePosition
from megatron_pipeweaver.models.context_parallel import GatheringAttention, SequenceShare
from megatron_pipeweaver.models.language import document_mask
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import (
    Case,
    Microbatch,
    OneProcess,
    Trainer,
    installed,
    megatron_ranks,
    reduced,
    schedule_for,
)
from tests.unit.models.examples import OPTIONS, batch, cut, vision_language

LENGTH, SAMPLES, HEADS, GROUPS, WIDTH = 12, 2, 4, 2, 3


def attention(kind: type, groups: ProcessGroupCollection) -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        context_parallel_size=groups.cp.size() if kind is GatheringAttention else 1,
    )
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def attend(ctx: RankContext) -> list[float]:
    """The largest difference to whole attention, of the output and every gradient, by mask."""
    with megatron_ranks(1, None, context_size=ctx.size) as groups:
        share = SequenceShare(groups.cp)
        generator = torch.Generator().manual_seed(1)

        def draw(heads: int) -> Tensor:
            sizes = (LENGTH, SAMPLES, heads, WIDTH)
            drawn = torch.randn(sizes, generator=generator, dtype=torch.float64)
            return drawn.requires_grad_()

        differences = []
        for mask in (None, document_mask(torch.tensor([0, 5, LENGTH]))):
            whole = [draw(HEADS), draw(GROUPS), draw(GROUPS)]
            parts = [share.take(one.detach(), 0).requires_grad_() for one in whole]
            weight = torch.randn(LENGTH, SAMPLES, HEADS * WIDTH, generator=generator).double()
            expected = attention(DotProductAttention, groups)(*whole, mask)
            (expected * weight).sum().backward()
            rows = None if mask is None else share.take(mask, 2)
            found = attention(GatheringAttention, groups)(*parts, rows)
            (found * share.take(weight, 0)).sum().backward()
            pairs = [
                (found, expected),
                *((a.grad, b.grad) for a, b in zip(parts, whole, strict=True)),
            ]
            differences += [float((a - share.take(b, 0)).abs().max()) for a, b in pairs]
        return differences


def test_attention_across_ranks_is_that_of_the_whole_sequence() -> None:
    for found in run_on_ranks(attend, 2):
        assert len(found) == 8
        assert max(found) < 1e-14


CONTEXT = 2
ALONE = {"context_parallel_size": 1}
SHARED = replace(
    OPTIONS,
    common={**OPTIONS.common, "context_parallel_size": CONTEXT},
    overrides={"vision": ALONE, "vision_projection": ALONE},
)


def dealt_batch(rng: random.Random, dtype: torch.dtype) -> list[Microbatch]:
    """Random microbatches whose sequences are multiples of 4 long."""
    made = []
    for _ in range(rng.randint(2, 4)):
        one = batch(rng.randint(0, 3), samples=rng.randint(1, 2), text=8, seed=rng.randrange(10**6))
        made.append({**one, "images": one["images"].to(dtype)})
    return made


CASES = [
    Case(
        spec=vision_language(tied=True),
        layout=cut(2, vision=(1, 1, 1, 0), language=(2, 1, 1, 1)),
        options=SHARED,
        draw=dealt_batch,
        split=True,
    ),
    Case(
        spec=vision_language(vision_layers=2, language_layers=4),
        layout=cut(2, vision=(1, 1), language=(2, 2)),
        options=SHARED,
        draw=dealt_batch,
        per_token_loss=True,
    ),
]


def train(ctx: RankContext, cases: list[Case], batches: int) -> list[float]:
    """The largest difference of losses and gradients to one process, relative, of every batch."""
    found = []
    for index, case in enumerate(cases):
        with megatron_ranks(2, case.layout.virtual_size, context_size=CONTEXT) as groups:
            ctx.note(f"case {index}: build")
            alone = copy.copy(groups)
            alone.cp = PipelinePosition(0, 1)
            trainer = Trainer(case, groups)
            oracle = OneProcess(replace(case, options=OPTIONS), alone)
            with installed(schedule_for(case, seed=index)):
                rng = random.Random(index)
                for number in range(batches):
                    ctx.note(f"case {index}, batch {number}")
                    drawn = case.draw(rng, torch.float64)
                    found.append(step(case, trainer, oracle, drawn))
    return found


def step(case: Case, trainer: Trainer, oracle: OneProcess, drawn: list[Microbatch]) -> float:
    """One iteration of both; the largest difference, relative to the largest of a gradient."""
    outcomes = trainer.step(drawn)
    losses, grads = oracle.step(drawn, 1 if case.per_token_loss else len(drawn))
    expected = reduced(case, [grads])
    if case.per_token_loss:
        # As Megatron does it, whose factor is in single precision.
        factor = 1.0 / torch.tensor(sum(int(one["loss_mask"].sum()) for one in drawn))
        expected = {name: one * factor for name, one in expected.items()}
    gradients = trainer.gradients()
    assert gradients
    pairs = [(one, expected[name]) for name, one in gradients.items()]
    if outcomes:
        pairs += [(one["lm loss"], loss) for one, loss in zip(outcomes, losses, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)


def test_gradients_are_those_of_one_process() -> None:
    for found in run_on_ranks(train, 4, CASES, 3, deadline_s=120):
        assert len(found) == 6
        # Megatron's cross entropy is in fp32, and rounds by shape; all else is at 1e-15.
        assert max(found) < 1e-6
        assert min(found) < 1e-13
