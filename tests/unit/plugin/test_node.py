"""What a rank may take of its machine's memory."""

import os

import torch

from megatron_pipeweaver.plugin.node import host_share_bytes, node_memory_bytes, ranks_of_node


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
