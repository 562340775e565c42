"""What a rank may take of its machine's memory."""

import os

import pytest
import torch

from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.planner.process import usable_cores
from megatron_pipeweaver.plugin.node import (
    host_share_bytes,
    node_memory_bytes,
    planners_of_node,
    ranks_of_node,
    search_threads,
)


def test_a_containers_limit_counts(tmp_path):
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    assert node_memory_bytes(limit) == physical  # there is none
    for text, expected in (("max\n", physical), ("4096\n", 4096), (f"{2 * physical}", physical)):
        limit.write_text(text)
        assert node_memory_bytes(limit) == expected


def test_ranks_share_their_node_evenly(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks_of_node({"LOCAL_WORLD_SIZE": "8"}) == 8
    assert ranks_of_node({}) == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ranks_of_node({}) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert host_share_bytes(0.5) == int(node_memory_bytes() * 0.5) // 2


@pytest.mark.parametrize(
    ("rank", "sizes", "planners"),
    [
        (3, {"pipeline": 4, "tensor": 2, "data": 1}, 1),
        (0, {"pipeline": 4, "data": 16}, 8),  # a node of first stages
        (9, {"pipeline": 4, "data": 16}, 8),
        (17, {"pipeline": 4, "data": 16}, 1),  # and one without
        (5, {"pipeline": 2, "tensor": 2, "context": 2, "data": 4}, 2),
        (7, {"pipeline": 1, "tensor": 4, "data": 2}, 2),
    ],
)
def test_the_planners_of_a_node_share_half_of_its_cores(monkeypatch, rank, sizes, planners):
    parallel = ParallelSizes(**sizes)
    assert planners_of_node(rank, 8, parallel) == planners
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("megatron_pipeweaver.plugin.node.usable_cores", lambda: 64)
    assert search_threads(parallel) == 32 // planners
    monkeypatch.undo()
    assert search_threads(ParallelSizes(pipeline=1)) == max(1, usable_cores() // 2)
