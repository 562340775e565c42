"""Every communicator PipeWeaver needs beside Megatron's own, made once, in one order everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class Communicators:
    """One rank's means to talk to the ranks that share its plan.

    `control` is a CPU group of every rank with this rank's share of the data: all pipeline,
    tensor and context ranks of one replica, which run one plan. `planning_rank` is the global
    rank in it that plans. `transport` moves activations along this rank's pipeline.
    """

    control: dist.ProcessGroup
    planning_rank: int
    pipeline_rank: int
    pipeline_size: int
    transport: ProcessGroupTransport


def connect(pipeline_group: dist.ProcessGroup, timeout: timedelta) -> Communicators:
    """Make all communicators; every rank of the job calls this at the same point.

    Args:
        pipeline_group: this rank's pipeline-parallel group.
        timeout: how long a wait may last before it ends with an error.
    """
    pipeline = dist.get_process_group_ranks(pipeline_group)
    rows = _gather_integers([parallel_state.get_data_parallel_rank(), *pipeline])
    replicas: dict[int, list[int]] = {}
    for rank, (replica, *_) in enumerate(rows):
        replicas.setdefault(replica, []).append(rank)
    mine: dist.ProcessGroup | None = None
    for ranks in (replicas[replica] for replica in sorted(replicas)):
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    pipelines = sorted({tuple(row[1:]) for row in rows})
    return Communicators(
        control=mine,
        planning_rank=min(dist.get_process_group_ranks(mine)),
        pipeline_rank=pipeline.index(dist.get_rank()),
        pipeline_size=len(pipeline),
        transport=ProcessGroupTransport(
            pipelines, device=torch.device(torch.cuda.current_device()), timeout=timeout
        ),
    )


def _gather_integers(row: list[int]) -> list[list[int]]:
    """Every rank's `row`, by global rank; rows are equally long."""
    device: Any = torch.cuda.current_device()
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [one.tolist() for one in gathered]
