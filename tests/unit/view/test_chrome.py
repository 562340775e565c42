import json
from dataclasses import replace

from megatron_pipeweaver.ir.trace import TraceKind
from megatron_pipeweaver.view.chrome import chrome_of_schedule, chrome_of_trace
from tests.unit.ir.examples import problem, schedule, trace


def events(data, phase):
    return [one for one in json.loads(data)["traceEvents"] if one["ph"] == phase]


def test_every_op_is_a_slice_in_microseconds():
    slices = events(chrome_of_schedule(schedule()), "X")
    assert [(one["pid"], one["name"]) for one in slices] == [
        (0, "language0.F0"),
        (0, "language0.B0"),
        (1, "language1.F0"),
        (1, "language1.B0"),
        (1, "language1.W0"),
    ]
    assert (slices[1]["ts"], slices[1]["dur"]) == (0.038, 0.012)
    assert slices[1]["args"] == {
        "op": "backward",
        "module": "language",
        "stage": 0,
        "microbatch": 0,
        "sub_microbatch": 0,
        "strategy": "keep",
    }


def test_ranks_are_named_processes():
    named = events(chrome_of_trace(trace()), "M")
    names = {(one["pid"], one["args"].get("name")) for one in named}
    assert {(0, "rank 0 (a)"), (1, "rank 1 (b)"), (0, "compute"), (0, "send")} <= names


def test_memory_is_a_counter_where_the_problem_is_known():
    assert events(chrome_of_schedule(schedule()), "C") == []
    counted = events(chrome_of_schedule(schedule(), problem()), "C")
    assert [(one["pid"], one["ts"], one["args"]["bytes"]) for one in counted] == [
        (0, 0, 4),
        (0, 0.05, 0),
        (1, 0.013, 4),
        (1, 0.043, 0),
    ]


def test_an_arrow_joins_a_send_to_its_receive():
    (send,) = [row for row in trace().ranks[0] if row.kind is TraceKind.SEND]
    receive = replace(send, kind=TraceKind.RECV, peer=0, start_ns=11, end_ns=13)
    other = replace(receive, key=receive.key._replace(microbatch=1))
    both = replace(trace(), ranks=(trace().ranks[0], (other, receive)))
    data = chrome_of_trace(both)
    (begin,), (end,) = events(data, "s"), events(data, "f")
    assert begin["id"] == end["id"]
    assert (begin["pid"], begin["ts"], end["pid"], end["ts"]) == (0, 0.01, 1, 0.013)
    assert events(chrome_of_trace(trace()), "s") == []  # a send without a receive has no arrow


def test_the_file_tells_what_it_is_of():
    assert json.loads(chrome_of_trace(trace()))["otherData"] == {
        "iteration": 3,
        "plan_sha256": "ab",
    }
    assert json.loads(chrome_of_schedule(schedule()))["otherData"]["lower_bound_ns"] == 40
