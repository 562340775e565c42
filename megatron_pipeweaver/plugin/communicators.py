"""Every communicator PipeWeaver needs beside Megatron's own, made once, in one order everywhere."""

from __future__ import annotations

from collections.abc import Collection
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

    `control` is a CPU group of all pipeline, tensor and context ranks of one replica, which run
    one plan; `planning_rank` is the global rank in it that plans. `pipeline` is a CPU group of
    this rank's pipeline, in pipeline order; `transport` moves activations along it.
    """

    control: dist.ProcessGroup
    planning_rank: int
    pipeline: dist.ProcessGroup
    pipeline_rank: int
    transport: ProcessGroupTransport


def connect(pipeline_group: dist.ProcessGroup, timeout: timedelta) -> Communicators:
    """Make all communicators; every rank of the job calls this at the same point.

    Args:
        pipeline_group: this rank's pipeline-parallel group.
        timeout: how long a wait may last before it ends with an error.
    """
    mine = tuple(dist.get_process_group_ranks(pipeline_group))
    rows = _gather_integers([parallel_state.get_data_parallel_rank(), *mine])
    pipelines = sorted({tuple(row[1:]) for row in rows})
    replicas: dict[int, list[int]] = {}
    for rank, (replica, *_) in enumerate(rows):
        replicas.setdefault(replica, []).append(rank)
    control = _own_group([replicas[replica] for replica in sorted(replicas)], timeout)
    return Communicators(
        control=control,
        planning_rank=min(dist.get_process_group_ranks(control)),
        pipeline=_own_group(pipelines, timeout),
        pipeline_rank=mine.index(dist.get_rank()),
        transport=ProcessGroupTransport(
            pipelines, device=torch.device(torch.cuda.current_device()), timeout=timeout
        ),
    )


def _own_group(partition: Collection[Collection[int]], timeout: timedelta) -> dist.ProcessGroup:
    """A CPU group for every part of the job's ranks, made in one order; returns this rank's."""
    own: dist.ProcessGroup | None = None
    for ranks in partition:
        group = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
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
