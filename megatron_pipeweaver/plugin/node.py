"""The machine that a rank runs on: its memory, its cores, and how many ranks share them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.planner.process import usable_cores

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def host_share_bytes(fraction: float) -> int:
    """This rank's even share of `fraction` of the node's memory."""
    return int(node_memory_bytes() * fraction) // ranks_of_node(os.environ)


def node_memory_bytes(limit: Path = _CGROUP) -> int:
    """The machine's memory, or what this container may have of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = limit.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(text)) if text.isdigit() else physical


def ranks_of_node(environment: Mapping[str, str]) -> int:
    """How many ranks share the machine: as the launcher says, else one for every GPU."""
    told = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told) if told.isdigit() else torch.cuda.device_count())


def search_threads(parallel: ParallelSizes) -> int:
    """How many threads a planner may search with: all of a node's together take half its cores."""
    rank = os.environ.get("RANK", "")
    planners = planners_of_node(int(rank or 0), ranks_of_node(os.environ), parallel)
    return max(1, usable_cores() // 2 // planners)


def planners_of_node(rank: int, ranks: int, parallel: ParallelSizes) -> int:
    """How many of the `ranks` on the machine of `rank` plan, the first one of every replica.

    Ranks are numbered as Megatron does: tensor, context, data, pipeline.
    """
    first, alike = rank - rank % ranks, parallel.tensor * parallel.context
    planning = range(0, alike * parallel.data, alike)
    return max(1, sum(one in planning for one in range(first, first + ranks)))
