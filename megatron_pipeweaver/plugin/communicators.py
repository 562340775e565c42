"""Every communicator PipeWeaver needs beside Megatron's own, made once, in one order everywhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.distributed_c10d import _get_default_store

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.runtime.courier import ROUND_TIMEOUT
from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport
from megatron_pipeweaver.runtime.watchdog import StoreBoard, WatchConfig, Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class Communicators:
    """One rank's means to talk to the ranks that share its plan.

    `control` is a CPU group of all ranks that run one plan: pipeline, tensor and context ranks of
    one replica, or of all that exchange tokens for experts; `planning_rank` is the global rank in
    it that plans, `ahead` a second group of the same ranks for plans on their way beside training
    (`runtime.courier`). `replicas` are the global ranks of each replica among them. `pipeline` is a
    CPU group of this rank's pipeline, in pipeline order; `transport` moves activations along it,
    and `watchdog` tells where its ranks stand.
    """

    control: dist.ProcessGroup
    ahead: dist.ProcessGroup
    planning_rank: int
    replicas: tuple[tuple[int, ...], ...]
    pipeline: dist.ProcessGroup
    pipeline_rank: int
    transport: ProcessGroupTransport
    watchdog: Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPartition:
    """A job's global ranks, cut thrice: by the plan, by the batch and by the pipeline they share.

    `replicas` share a batch and stand in the order of their data-parallel rank, `pipelines` and
    `plans` in that of their ranks; a replica's and a plan's ranks rise, a pipeline's stand in
    pipeline order. Every rank is in one of each. A pipeline lies within one replica, which holds
    one per tensor and context rank, and a replica within one plan, which several run together
    where their stages exchange tokens for experts.
    """

    plans: tuple[tuple[int, ...], ...]
    replicas: tuple[tuple[int, ...], ...]
    pipelines: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = list(range(sum(map(len, self.replicas))))
        cuts = {"plans": self.plans, "replicas": self.replicas, "pipelines": self.pipelines}
        for what, parts in cuts.items():
            if sorted(rank for part in parts for rank in part) != ranks:
                raise ConfigError(
                    f"job of {len(ranks)} ranks: its {what} {parts} do not hold every rank once; "
                    "give each rank its own pipeline-parallel group"
                )
        for pipeline in self.pipelines:
            if not set(pipeline) <= set(self.replica_of(pipeline[0])):
                raise ConfigError(
                    f"job of {len(ranks)} ranks: pipeline {pipeline} crosses replicas; "
                    "its ranks must share one data-parallel rank"
                )

    def plan_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that run the plan of `rank`, itself among them."""
        return next(part for part in self.plans if rank in part)

    def replica_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that train on the batch of `rank`, itself among them."""
        return next(part for part in self.replicas if rank in part)

    def replicas_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The replicas that run the plan of `rank`."""
        plan = self.plan_of(rank)
        return tuple(part for part in self.replicas if part[0] in plan)

    def planning_rank(self, rank: int) -> int:
        """The rank that plans for `rank`."""
        return self.plan_of(rank)[0]

    def pipeline_of(self, rank: int) -> tuple[int, ...]:
        """The pipeline of `rank`, in pipeline order."""
        return next(part for part in self.pipelines if rank in part)

    def pipeline_rank(self, rank: int) -> int:
        """The place of `rank` in its pipeline."""
        return self.pipeline_of(rank).index(rank)


def partition_ranks(
    rows: Sequence[Sequence[int]], expert_groups: Sequence[Sequence[int]] = ()
) -> RankPartition:
    """How the ranks of a job share plans, batches and pipelines.

    Args:
        rows: for every global rank in order, its data-parallel rank, then the global ranks of its
            pipeline in pipeline order.
        expert_groups: for every global rank in order, those with which it exchanges tokens for
            experts; left out where nobody does.

    Raises:
        ConfigError: the rows of two ranks contradict each other.
    """
    replicas: dict[int, list[int]] = {}
    for rank, (replica, *_) in enumerate(rows):
        replicas.setdefault(replica, []).append(rank)
    plans = {replica: set(ranks) for replica, ranks in replicas.items()}
    for group in expert_groups:
        first, *others = sorted({rows[rank][0] for rank in group})
        for other in others:
            if plans[other] is not plans[first]:
                joined = plans[first] | plans[other]
                plans |= {rows[rank][0]: joined for rank in joined}
    return RankPartition(
        plans=tuple(sorted({tuple(sorted(ranks)) for ranks in plans.values()})),
        replicas=tuple(tuple(replicas[replica]) for replica in sorted(replicas)),
        pipelines=tuple(sorted({tuple(pipeline) for _, *pipeline in rows})),
    )


def connect(
    pipeline_group: dist.ProcessGroup, timeout: timedelta, watch: WatchConfig
) -> Communicators:
    """Make all communicators; every rank of the job calls this at the same point.

    Args:
        pipeline_group: this rank's pipeline-parallel group.
        timeout: how long a wait may last before it ends with an error.
        watch: when to tell where all ranks stand.
    """
    mine = dist.get_process_group_ranks(pipeline_group)
    experts = dist.get_process_group_ranks(
        parallel_state.get_expert_tensor_and_model_parallel_group()
    )
    ranks = partition_ranks(
        _gather_integers([parallel_state.get_data_parallel_rank(), *mine]),
        _gather_integers(experts),
    )
    rank = dist.get_rank()
    board = StoreBoard(_get_default_store(), "-".join(map(str, ranks.pipeline_of(rank))))
    return Communicators(
        control=_own_group(ranks.plans, timeout),
        ahead=_own_group(ranks.plans, ROUND_TIMEOUT),
        planning_rank=ranks.planning_rank(rank),
        replicas=ranks.replicas_of(rank),
        pipeline=_own_group(ranks.pipelines, timeout),
        pipeline_rank=ranks.pipeline_rank(rank),
        transport=ProcessGroupTransport(
            ranks.pipelines, device=torch.device(torch.cuda.current_device()), timeout=timeout
        ),
        watchdog=Watchdog(ranks.pipeline_rank(rank), board, watch),
    )


def _own_group(partition: Collection[Collection[int]], timeout: timedelta) -> dist.ProcessGroup:
    """A CPU group for every part of the job's ranks, made in one order; returns this rank's."""
    own: dist.ProcessGroup | None = None
    for ranks in partition:
        # torch's versions disagree on what it returns on ranks outside; they do not look at it.
        group: Any = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    assert own is not None
    return own


def _gather_integers(row: list[int]) -> list[list[int]]:
    """Every rank's `row`, by global rank; rows are equally long."""
    device: Any = torch.cuda.current_device()
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [one.tolist() for one in gathered]
