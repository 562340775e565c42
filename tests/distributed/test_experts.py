"""Experts on gloo ranks: replicas that exchange tokens run one plan, each on its own batch."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter

from megatron_pipeweaver.ir.lmm import ExpertOptions
from megatron_pipeweaver.ir.plan import ComputeAction, Plan
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.parameters import global_name
from megatron_pipeweaver.plugin.schedule import IterationReport
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import (
    Case,
    Microbatch,
    OneProcess,
    Trainer,
    installed,
    megatron_ranks,
    reduced,
    replica_rank,
    schedule_for,
)
from tests.unit.models.examples import OPTIONS, batch, cut
from tests.unit.models.test_experts import EXPERTS, with_experts

REPLICAS, ITERATIONS = 2, 3
BALANCED = {
    "moe_aux_loss_coeff": 0.1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
    "add_bias_linear": False,
}


def case(experts: ExpertOptions = EXPERTS, *, dispatcher: str = "alltoall", **more: Any) -> Case:
    routed = {
        **BALANCED,
        "moe_token_dispatcher_type": dispatcher,
        "expert_model_parallel_size": REPLICAS,
    }
    return Case(
        spec=with_experts(experts),
        layout=cut(2, vision=[2, 1], language=[1, 2, 1, 1]),
        options=replace(OPTIONS, overrides={"language": routed}),
        **more,
    )


CASES = [
    case(overlap_grad_reduce=True),
    case(replace(EXPERTS, dense_layers=0, active=1), dispatcher="allgather", split=True),
    case(per_token_loss=True, deterministic=False),
]


def draw(case: Case, seed: int, replica: int) -> list[Microbatch]:
    """One replica's batch: as many microbatches as every other's, of other images and lengths."""
    rng = random.Random(f"{seed} {replica}")
    count = random.Random(seed).randint(2, 5)
    even = "allgather" in case.options.overrides["language"].values()
    drawn = []
    for _ in range(count):
        images = 2 if even else rng.choice([0, 0, 1, 3, 5])
        drawn.append(
            batch(images, text=7 if even else rng.randint(5, 9), seed=rng.randrange(10**6))
        )
    return drawn


def with_all_experts(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The groups of a rank that holds all experts."""
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    found = copy.copy(groups)
    found.ep = found.tp_ep = found.expt_tp = found.expt_dp = own
    return found


def train(ctx: RankContext, cases: list[Case]) -> tuple[list[float], list[Any]]:
    """The largest relative difference of every iteration, and the order of the language model."""
    differences, orders = [], []
    for case in cases:
        seen: list[IterationReport] = []
        with megatron_ranks(2, case.layout.virtual_size, expert_size=REPLICAS):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            trainer = Trainer(case, groups)
            whole = {**case.options.overrides["language"], "expert_model_parallel_size": 1}
            options = replace(case.options, overrides={"language": whole})
            oracle = OneProcess(replace(case, options=options), with_all_experts(groups))
            with installed(schedule_for(case, seed=1, on_iteration=seen.append)):
                for iteration in range(ITERATIONS):
                    ctx.note(f"iteration {iteration} of {case}")
                    replicas = [draw(case, iteration, one) for one in range(REPLICAS)]
                    differences.append(difference(trainer, oracle, replicas))
        orders += [order_of_language(one.received.plan.plan) for one in seen]
    return differences, orders


def order_of_language(plan: Plan) -> list[list[tuple[Any, str]]]:
    """Every pipeline rank's ops in whose layers experts may stand, with their strategies."""
    return [
        [
            (one.op, one.strategy)
            for one in rank
            if isinstance(one, ComputeAction) and one.op.module == "language"
        ]
        for rank in plan.ranks
    ]


def difference(trainer: Trainer, oracle: OneProcess, replicas: list[list[Microbatch]]) -> float:
    """One iteration of both; the largest difference, relative to the largest of its tensor."""
    case, mine = trainer.case, replica_rank()
    outcomes = trainer.step(replicas[mine])
    steps = [oracle.step(one, 1 if case.per_token_loss else len(one)) for one in replicas]
    expected = reduced(case, [gradients for _, gradients in steps])
    if case.per_token_loss:
        # As Megatron does it, whose factor is in single precision.
        factor = 1.0 / torch.tensor(
            sum(int(one["loss_mask"].sum()) for drawn in replicas for one in drawn)
        )
        expected = {name: one * factor for name, one in expected.items()}
    pairs = [(one, expected[name]) for name, one in trainer.gradients().items()]
    losses = steps[mine][0]
    pairs += [(one["lm loss"], loss) for one, loss in zip(outcomes, losses, strict=False)]
    moved = routers([chunk for stages in oracle.stages.values() for chunk in stages])
    for one in moved.values():
        sent, one.local_tokens_per_expert = one.local_tokens_per_expert, torch.zeros(EXPERTS.count)
        one.expert_bias += BALANCED["moe_router_bias_update_rate"] * (sent.mean() - sent).sign()
    own = routers([one.module for one in trainer.model])
    # Biases are steps of one size, in single precision, and may come back to zero.
    pairs += [(one.expert_bias + 1, moved[name].expert_bias + 1) for name, one in own.items()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)


def routers(chunks: list[ModelChunk]) -> dict[str, Any]:
    """The routers by the names of their weights."""
    return {
        global_name(chunk, f"{name}.weight"): one
        for chunk in chunks
        for name, one in chunk.named_modules()
        if isinstance(one, TopKRouter)
    }


def test_replicas_that_exchange_tokens_have_the_gradients_of_one_process() -> None:
    found = run_on_ranks(train, 4, CASES, deadline_s=120)
    for differences, orders in found:
        assert len(differences) == len(CASES) * ITERATIONS
        # Megatron's cross entropy is in fp32, and rounds by shape; all else is at 1e-15.
        assert max(differences) < 1e-6
        assert min(differences) < 1e-13
        assert orders == found[0][1], "replicas meet in every layer with experts"
