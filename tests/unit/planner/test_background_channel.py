"""Messages over a socket: whole, in order, and never blocking the training's end."""

import fcntl
import resource
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.planner.channel import Channel
from megatron_pipeweaver.planner.messages import Failure, Ready, pack, split_parts, unpack


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_messages_arrive_whole_and_in_order(messages):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = Channel(ours), Channel(theirs)
        for one in messages:
            sender.send(one)
        assert [receiver.receive(5) for _ in messages] == messages
        assert receiver.receive(0) is None


def test_a_reader_that_stands_still_blocks_nobody(ends):
    channel, theirs = ends
    started = time.monotonic()
    message = b"x" * (8 << 20)
    channel.send(message)
    channel.flush(0.05)
    assert channel.receive(0.05) is None
    assert time.monotonic() - started < 20
    reader = Channel(theirs)
    while (found := reader.receive(0.01)) is None:
        channel.flush(0.01)
    assert found == message


def test_a_closed_end_is_told(ends):
    channel, theirs = ends
    theirs.close()
    with pytest.raises(TransferError, match="closed"):
        channel.receive(5)
    with pytest.raises(TransferError, match="planner channel"):
        channel.send(b"hello")


def test_what_is_no_message_is_told(ends):
    channel, theirs = ends
    theirs.sendall(b"garbage garbage")
    with pytest.raises(ConfigError, match="not a message"):
        channel.receive(5)


def test_packed_messages_come_back_with_what_stands_behind_them():
    message = Failure(number=3, reason="x\ny")
    assert unpack(pack(message, b"a\n", b"\0b")) == (message, b"a\n\0b")
    assert unpack(pack(Ready(process=1))) == (Ready(process=1), b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not readable JSON"),
        (b'{"kind":"oracle","value":{}}\n', "is 'oracle'; it must be one of"),
        (b'{"kind":"failure","value":{"number":1}}\n', "key 'reason' is missing"),
    ],
)
def test_what_is_no_message_of_ours_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        unpack(data)


def test_parts_of_another_size_are_refused():
    assert split_parts((1, 0, 2), b"abc") == (b"a", b"", b"bc")
    with pytest.raises(ConfigError, match="3 bytes behind an answer of 4"):
        split_parts((4,), b"abc")


def test_a_rank_with_more_than_1024_open_files_still_talks_to_its_planner(ends):
    channel, theirs = ends
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        high = socket.socket(fileno=fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 1100))
        with high:
            receiver = Channel(high)
            channel.send(b"hello")
            assert receiver.receive(5) == b"hello"
            assert receiver.receive(0) is None
            receiver.send(b"back")
            receiver.flush(5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert channel.receive(5) == b"back"
