"""Which links a job has, and the local transport's rendezvous."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.runtime import transfer
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


class FakeEvent:
    """An event that has come after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class FakeStream:
    def __init__(self, events: list[FakeEvent]) -> None:
        self.events = events

    def record_event(self) -> FakeEvent:
        return self.events.pop(0)


class FakeDist:
    """`torch.distributed` as NCCL is: messages of a group in the order of their posts, no tags."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.made: list[tuple[int, ...]] = []
        self.posted: list[tuple[str, int, tuple[int, ...]]] = []
        self.groups: list[int] = []
        self.patience: set[timedelta] = set()
        self.waits: list[tuple[Any, ...]] = []

    def get_rank(self) -> int:
        return self.rank

    def new_group(
        self, ranks: list[int], *, timeout: timedelta, **_: Any
    ) -> tuple[int, tuple[int, ...]]:
        self.patience.add(timeout)
        self.made.append(tuple(ranks))
        return len(self.made) - 1, tuple(ranks)

    isend, irecv = "isend", "irecv"

    def P2POp(
        self, post: str, tensor: torch.Tensor, peer: int, *, group: Any, tag: int = 0
    ) -> tuple[str, int, Any]:
        return post, peer, group

    def batch_isend_irecv(self, operations: list[tuple[str, int, Any]]) -> list[FakeDist]:
        """As NCCL does it: of one process group, and with one thing to wait for."""
        assert len({group for _, _, group in operations}) == 1
        self.posted.append(operations[0])
        self.groups.append(len(operations))
        return [self]

    def wait(self, *limit: Any) -> None:
        self.waits.append(limit)


def test_every_rank_makes_the_same_communicators_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipelines = [(0, 2, 4), (1, 3, 5)]
    made, probed = [], []
    for rank in range(6):
        fake = FakeDist(rank)
        monkeypatch.setattr(transfer, "dist", fake)
        transfer.ProcessGroupTransport(
            pipelines, device=torch.device("cpu"), timeout=timedelta(seconds=1)
        )
        made.append(fake.made)
        probed.append([group for _, _, group in fake.posted])
    assert all(one == made[0] for one in made)
    assert len(made[0]) == 12  # three pairs of two pipelines, both directions
    for one in probed:  # each link is tried once, in one order everywhere, so no ring can wait
        assert one == sorted(one)
        assert len(set(one)) == len(one) == 4


def transport_on_a_device(
    monkeypatch: pytest.MonkeyPatch, timeout_s: float = 1
) -> tuple[FakeDist, transfer.ProcessGroupTransport]:
    """Rank 0 of two, whose tensors are not on the host; both links work."""
    fake = FakeDist(0)
    monkeypatch.setattr(transfer, "dist", fake)
    events = [FakeEvent(0), FakeEvent(2)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(events))
    made = transfer.ProcessGroupTransport(
        [(0, 1)], device=torch.device("meta"), timeout=timedelta(seconds=timeout_s)
    )
    return fake, made


def test_directions_do_not_share_a_communicator_and_device_waits_stay_on_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, transport = transport_on_a_device(monkeypatch)
    fake.posted.clear()
    fake.waits.clear()
    events = [FakeEvent(0), FakeEvent(3)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(events))
    (sent,) = transport.isend([MESSAGE], [torch.zeros(2, 3)])
    back = replace(MESSAGE, source_rank=1, target_rank=0)
    (received,) = transport.irecv([back])
    (out, to, first), (inward, source, second) = fake.posted
    assert (out, to, inward, source) == ("isend", 1, "irecv", 1)
    assert first != second
    sent.wait()
    assert received.wait().shape == (2, 3)
    assert fake.waits == [(), ()]  # a time limit would block the host
    transport.finish()
    assert events == []
    assert (sent._awaited, received._awaited) == ([], [])  # type: ignore[attr-defined]


def test_a_link_of_devices_that_does_not_work_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "dist", FakeDist(0))
    events = [FakeEvent(0), FakeEvent(10**9)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(events))
    with pytest.raises(TransferError, match=r"link from global rank 1 to 0: no byte .* 0\.05 s"):
        transfer.ProcessGroupTransport(
            [(0, 1)], device=torch.device("meta"), timeout=timedelta(seconds=0.05)
        )


def test_a_wait_on_a_stream_that_does_not_end_is_told_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, transport = transport_on_a_device(monkeypatch, timeout_s=0.05)
    assert fake.patience == {timedelta(seconds=0.1)}  # NCCL would end the process
    events = [FakeEvent(0), FakeEvent(10**9), FakeEvent(10**9)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(events))
    transport.isend([MESSAGE], [torch.zeros(2, 3)])[0].wait()
    back = replace(MESSAGE, source_rank=1, target_rank=0)
    for one in transport.irecv([back, replace(back, sequence=1)]):
        one.wait()
    with pytest.raises(TransferError, match=r"from rank 1 did not go through within 0\.05 s; see"):
        transport.finish()
    transport.finish()  # what was told is not told again


def test_a_group_is_posted_once_and_what_has_no_bytes_needs_no_wire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, transport = transport_on_a_device(monkeypatch)
    fake.groups.clear()
    fake.waits.clear()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream([FakeEvent(0)] * 2))
    empty = replace(MESSAGE, sequence=1, shape=(0, 3))
    last = replace(MESSAGE, sequence=2)
    sent = transport.isend(
        [MESSAGE, empty, last], [torch.zeros(2, 3), torch.zeros(0, 3), torch.ones(2, 3)]
    )
    assert fake.groups == [2]
    assert [one.wait().shape for one in sent] == [(2, 3), (0, 3), (2, 3)]
    assert len(fake.waits) == 2
    assert transport.isend([empty], [torch.zeros(0, 3)])[0].wait().numel() == 0
    assert fake.groups == [2]


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
    (sent,) = transport.isend([MESSAGE], [tensor])
    with pytest.raises(TransferError, match=r"to rank 1 did not go through within 0\.01 s"):
        sent.wait()
    (received,) = transport.irecv([MESSAGE])
    assert torch.equal(sent.wait(), tensor)
    assert torch.equal(received.wait(), tensor)
    (other,) = transport.irecv([replace(MESSAGE, sequence=1)])
    with pytest.raises(TransferError, match="from rank 0 did not arrive"):
        other.wait()


def test_of_a_group_nothing_has_gone_through_before_all_has() -> None:
    network = LocalNetwork(timeout_s=0.01)
    transport = LocalTransport(network)
    later = replace(MESSAGE, sequence=1)
    sent = transport.isend([MESSAGE, later], [torch.zeros(2, 3), torch.ones(2, 3)])
    (received,) = transport.irecv([MESSAGE])
    for one in sent:
        with pytest.raises(TransferError, match="never posted the receive"):
            one.wait()
    transport.irecv([later])
    assert [float(one.wait().sum()) for one in sent] == [0.0, 6.0]
    assert float(received.wait().sum()) == 0.0
    received = transport.irecv([replace(MESSAGE, sequence=2), replace(MESSAGE, sequence=3)])[0]
    transport.isend([replace(MESSAGE, sequence=2)], [torch.zeros(2, 3)])
    with pytest.raises(TransferError, match="that rank never sent it"):
        received.wait()


def test_without_tags_messages_are_matched_in_the_order_of_their_posts() -> None:
    later = replace(MESSAGE, sequence=1)
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    for by_order, expected in ((False, second), (True, first)):
        network = LocalNetwork(timeout_s=1.0, by_order=by_order)
        sender, receiver = LocalTransport(network), LocalTransport(network)
        sender.isend([MESSAGE], [first])
        sender.isend([later], [second])
        (got,) = receiver.irecv([later])  # a receiver that does not keep to the sender's order
        assert torch.equal(got.wait(), expected)
