"""Real megatron-core chunks on gloo ranks, by searched schedules, against one process."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import initialize_by_name
from megatron_pipeweaver.plugin.schedule import IterationReport
from megatron_pipeweaver.runtime.stage import split_backwards
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import (
    Case,
    OneProcess,
    Trainer,
    installed,
    megatron_ranks,
    reduced,
    replica_rank,
    schedule_for,
)
from tests.unit.models.examples import OPTIONS, cut, vision_language

# Stages without a layer, counts that do not divide, K from 1 to 3, tied and untied embeddings.
FOUR_RANKS = [
    Case(
        spec=vision_language(tied=True),
        layout=cut(4, vision=(1, 1, 1, 0), language=(1, 1, 1, 1, 1, 0, 0, 0)),
    ),
    Case(
        spec=vision_language(vision_layers=9, language_layers=4),
        layout=cut(4, vision=(1, 1, 1, 1, 1, 1, 1, 2), language=(1, 1, 1, 1)),
        split=True,
    ),
    Case(
        spec=vision_language(tied=True, vision_layers=4, language_layers=13),
        layout=cut(4, vision=(1, 1, 1, 1), language=(2, *[1] * 11)),
        images_per_pass=1,
        split=True,
    ),
    Case(
        spec=vision_language(vision_layers=12, language_layers=8),
        layout=cut(4, vision=[1] * 12, language=[1] * 8),
        per_token_loss=True,
    ),
    Case(
        spec=vision_language(frozen=True, vision_layers=4, language_layers=4),
        layout=cut(4, vision=[1] * 4, language=[1] * 4),
    ),
]
TWO_BY_TWO = [
    Case(
        spec=vision_language(tied=True),
        layout=cut(2, vision=(2, 1), language=(2, 1, 1, 1)),
    ),
    Case(
        spec=vision_language(vision_layers=6, language_layers=6),
        layout=cut(2, vision=[1] * 6, language=[2, 1, 2, 1]),
        overlap_grad_reduce=True,
        images_per_pass=3,
        split=True,
    ),
]


def compare(
    rng: random.Random,
    case: Case,
    trainer: Trainer,
    oracle: OneProcess,
    replicas: int,
    close: Any = torch.equal,
) -> int:
    """One iteration of both on a random batch; returns how many gradients were compared."""
    dtype = case.options.params_dtype
    batches = [case.draw(rng, dtype) for _ in range(replicas)]
    outcomes = trainer.step(batches[replica_rank()])
    losses, grads = [], []
    for microbatches in batches:
        loss, grad = oracle.step(microbatches, 1 if case.per_token_loss else len(microbatches))
        losses.append(loss)
        grads.append(grad)
    expected = reduced(case, grads)
    if case.per_token_loss:
        tokens = sum(int(one["loss_mask"].sum()) for part in batches for one in part)
        expected = {name: one * (1.0 / torch.tensor(tokens)) for name, one in expected.items()}
    if outcomes:
        for found, loss in zip(outcomes, losses[replica_rank()], strict=True):
            assert close(found["lm loss"], loss)
    found_grads = trainer.gradients()
    for name, found in found_grads.items():
        assert close(found, expected[name]), (name, (found - expected[name]).abs().max())
    return len(found_grads)


def train_and_compare(
    ctx: RankContext, cases: list[Case], pipeline_size: int, batches: int
) -> list[int]:
    compared = []
    split: list[bool] = []

    def note_split(report: IterationReport) -> None:
        split.append(bool(split_backwards(report.received.plan.plan)))

    for index, case in enumerate(cases):
        split.clear()
        with megatron_ranks(pipeline_size, case.layout.virtual_size) as groups:
            ctx.note(f"case {index}: build")
            trainer, oracle = Trainer(case, groups), OneProcess(case, groups)
            with installed(schedule_for(case, seed=index, on_iteration=note_split)):
                rng = random.Random(100 * pipeline_size + index)
                for number in range(batches):
                    ctx.note(f"case {index}, batch {number}")
                    replicas = ctx.size // pipeline_size
                    compared.append(compare(rng, case, trainer, oracle, replicas))
        assert any(split) == case.split
    return compared


def test_four_ranks_equal_one_process_bit_by_bit() -> None:
    compared = run_on_ranks(train_and_compare, 4, FOUR_RANKS, 4, 5, deadline_s=240)
    assert all(len(one) == 25 for one in compared)
    assert all(min(one[:20]) > 0 for one in compared)


def test_two_replicas_of_two_ranks_equal_one_process_bit_by_bit() -> None:
    compared = run_on_ranks(train_and_compare, 4, TWO_BY_TWO, 2, 5, deadline_s=240)
    assert all(len(one) == 10 and min(one) > 0 for one in compared)


def in_single_precision(ctx: RankContext) -> float:
    case = Case(
        spec=vision_language(tied=True),
        layout=cut(4, vision=(1, 1, 1, 0), language=(1, 1, 1, 1, 1, 0, 0, 0)),
        options=ModelOptions(
            max_sequence_length=64,
            image_size=OPTIONS.image_size,
            image_token_id=OPTIONS.image_token_id,
            initialize=partial(initialize_by_name, seed=3),
            common=OPTIONS.common,
        ),
        deterministic=False,
    )
    furthest = 0.0

    def close(found: Tensor, expected: Tensor) -> bool:
        nonlocal furthest
        furthest = max(furthest, float((found - expected).abs().max()))
        return furthest < 1e-6

    with megatron_ranks(4, case.layout.virtual_size) as groups:
        trainer, oracle = Trainer(case, groups), OneProcess(case, groups)
        with installed(schedule_for(case, seed=7)):
            rng = random.Random(5)
            for _ in range(4):
                compare(rng, case, trainer, oracle, 1, close)
    return furthest


def test_free_order_in_single_precision_stays_within_a_millionth() -> None:
    run_on_ranks(in_single_precision, 4, deadline_s=120)
