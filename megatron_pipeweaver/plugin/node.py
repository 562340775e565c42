"""The machine that a rank runs on: its memory, and how many ranks share it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

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
