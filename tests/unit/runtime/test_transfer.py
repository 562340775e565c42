"""Which links a job has, and the local transport's rendezvous."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.runtime.local import LocalNetwork, LocalTransport
from megatron_pipeweaver.runtime.transfer import describe, directed_pairs

MESSAGE = Message(
    source=parse_op("vision0.F3"),
    target=parse_op("vision1.F3"),
    source_rank=0,
    target_rank=1,
    sequence=0,
    shape=(2, 3),
    dtype="float32",
)


@pytest.mark.parametrize(
    ("pipelines", "pairs"),
    [
        ([[0]], ()),
        ([[0, 1]], ((0, 1), (1, 0))),
        ([[5, 2, 7]], ((2, 5), (2, 7), (5, 2), (5, 7), (7, 2), (7, 5))),
        ([[0, 2], [1, 3]], ((0, 2), (1, 3), (2, 0), (3, 1))),
        ([[1, 3], [0, 2]], ((0, 2), (1, 3), (2, 0), (3, 1))),
    ],
)
def test_links_are_directed_neighbours_in_one_order(
    pipelines: list[list[int]], pairs: tuple[tuple[int, int], ...]
) -> None:
    assert directed_pairs(pipelines) == pairs


def test_a_pipeline_of_four_wraps_around() -> None:
    pairs = directed_pairs([range(4)])
    assert len(pairs) == 8
    assert {(3, 0), (0, 3)} <= set(pairs)
    assert (0, 2) not in pairs


def test_a_rank_in_two_pipelines_is_refused() -> None:
    with pytest.raises(ConfigError, match="a rank stands twice"):
        directed_pairs([[0, 1], [1, 2]])


def test_messages_are_told_with_their_size() -> None:
    assert describe(MESSAGE) == "vision0.F3 > vision1.F3 (24 bytes)"


def test_a_send_is_done_only_when_its_receive_is_posted() -> None:
    network = LocalNetwork(timeout_s=0.01)
    transport = LocalTransport(network)
    tensor = torch.arange(6.0).reshape(2, 3)
    sent = transport.isend(MESSAGE, tensor)
    with pytest.raises(TransferError, match=r"to rank 1 did not go through within 0\.01 s"):
        sent.wait()
    received = transport.irecv(MESSAGE)
    assert torch.equal(sent.wait(), tensor)
    assert torch.equal(received.wait(), tensor)
    with pytest.raises(TransferError, match="from rank 0 did not arrive"):
        received.wait()


def test_without_tags_messages_are_matched_in_the_order_of_their_posts() -> None:
    later = replace(MESSAGE, sequence=1)
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    for by_order, expected in ((False, second), (True, first)):
        network = LocalNetwork(timeout_s=1.0, by_order=by_order)
        sender, receiver = LocalTransport(network), LocalTransport(network)
        sender.isend(MESSAGE, first)
        sender.isend(later, second)
        got = receiver.irecv(later)  # a receiver that does not keep to the sender's order
        assert torch.equal(got.wait(), expected)
