"""The post between training and its planner: in order, packed and read in threads of its own."""

import socket
import threading
import weakref

import pytest

from megatron_pipeweaver.errors import ConfigError, PlanInvalidError, TransferError
from megatron_pipeweaver.ir.codec import to_bytes
from megatron_pipeweaver.planner.channel import Channel
from megatron_pipeweaver.planner.messages import Answer, Failure, Ready, pack, unpack
from megatron_pipeweaver.planner.post import Post
from megatron_pipeweaver.planner.wire import encode
from tests.unit.planner.examples import batch_of, make_planner


@pytest.fixture
def post():
    ours, theirs = socket.socketpair()
    made, planner = Post(Channel(ours)), Channel(theirs)
    yield made, planner
    made.close()
    planner.close()
    assert not any(one.is_alive() for one in made._threads)


def answer(number, *parts):
    return pack(Answer(number=number, sizes=tuple(map(len, parts))), *parts)


def test_letters_leave_in_order_and_are_packed_elsewhere(post):
    made, planner = post
    packed_by = []

    def letter():
        packed_by.append(threading.current_thread())
        return pack(Ready(process=1))

    for number in range(20):
        made.send(letter if number % 2 else pack(Ready(process=0)))
    found = [unpack(planner.receive(20))[0].process for _ in range(20)]
    assert found == [0, 1] * 10
    assert threading.main_thread() not in packed_by


def test_a_planner_that_reads_nothing_holds_nobody_up(post):
    made, _ = post
    for _ in range(4):
        made.send(b"x" * (8 << 20))
    assert made.receive(0.01) is None


def test_a_plan_arrives_verified_and_is_told_of(post):
    made, planner = post
    heard = []
    planned = make_planner().plan(batch_of(3, 0))
    made.tell(2, heard.append)
    planner.send(answer(1, encode(planned, "another")))
    planner.send(answer(2, encode(planned, "digest")))
    first, second = made.receive(20), made.receive(20)
    assert (first.message.number, second.message.number) == (1, 2)
    assert second.answer.received.plan.fingerprint == planned.plan.fingerprint
    assert heard == [second.answer]


def test_requests_that_are_never_answered_leave_nothing_behind(post):
    made, _ = post

    class Round:
        """What whoever hears of a plan holds."""

        def hear(self, answer):
            del answer

    rounds = [Round() for _ in range(3)]
    held = [weakref.ref(one) for one in rounds]
    for number, one in enumerate(rounds):
        made.tell(number, one.hear)
    del one, rounds
    assert [one() is None for one in held] == [True, True, False]


def test_a_plan_that_is_none_is_told_where_it_is_looked_for(post):
    made, planner = post
    heard = []
    data = encode(make_planner().plan(batch_of(3, 0)), "digest")
    head, _, body = data.partition(b"\n")
    made.tell(1, heard.append)
    planner.send(answer(1, data[:-200]))
    planner.send(answer(2, head + b"\n" + body.replace(b'"irecv"', b'"isend"', 1)))
    planner.send(pack(Failure(number=3, reason="no memory")))
    planner.send(answer(4))
    assert isinstance(made.receive(20).answer, ConfigError)
    assert isinstance(made.receive(20).answer, PlanInvalidError)
    assert made.receive(20).message == Failure(number=3, reason="no memory")
    assert "without a plan" in str(made.receive(20).answer)
    assert heard == []


def test_what_is_no_message_is_raised_where_training_looks(post):
    made, planner = post
    planner.send(to_bytes({"kind": "guess", "value": {}}))
    with pytest.raises(ConfigError, match="'guess'"):
        made.receive(20)


def test_the_end_of_the_planner_is_raised_where_training_looks(post):
    made, planner = post
    planner.send(pack(Ready(process=1)))
    planner.shut_down()
    assert made.receive(20).message == Ready(process=1)
    with pytest.raises(TransferError):
        made.receive(20)
