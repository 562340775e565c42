import copy
import json

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import (
    digest,
    problem_from_json,
    problem_to_json,
    schedule_from_json,
    schedule_to_json,
    trace_from_json,
    trace_to_json,
)
from tests.unit.ir.examples import problem, schedule, trace

READERS = {"problem": problem_from_json, "schedule": schedule_from_json, "trace": trace_from_json}
VALUES = {
    "problem": json.loads(problem_to_json(problem())),
    "schedule": json.loads(schedule_to_json(schedule())),
    "trace": json.loads(trace_to_json(trace())),
}
REMOVE = object()


def changed(which, path, value):
    """The JSON example `which` with the value at `path` set, or removed."""
    root = copy.deepcopy(VALUES[which])
    *way, last = path
    spot = root
    for step in way:
        spot = spot[step]
    if value is REMOVE:
        del spot[last]
    else:
        spot[last] = value
    return json.dumps(root).encode()


def refusal(which, data):
    with pytest.raises(ConfigError) as caught:
        READERS[which](data, "file.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("file.json: ")
    return str(caught.value).removeprefix("file.json: ")


def test_round_trips():
    assert problem_from_json(problem_to_json(problem())) == problem()
    assert schedule_from_json(schedule_to_json(schedule())) == schedule()
    assert trace_from_json(trace_to_json(trace())) == trace()


def test_bytes_are_canonical():
    text = problem_to_json(problem())
    assert text == problem_to_json(problem_from_json(text))
    assert text.endswith(b"}\n")
    assert b" " not in text
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


P0 = ("microbatches", 0, "passes", 0)
P2 = ("microbatches", 0, "passes", 2)
ONE = (*P0, "stages", 1, "strategies", 0)
AT_P0 = "$.microbatches[0].passes[0]"
AT_ONE = f"{AT_P0}.stages[1].strategies[0]"

PROBLEM_REFUSALS = [
    (("format",), REMOVE, "$: key 'format' is missing; add it ('pipeweaver.problem/1')"),
    (("format",), "pipeweaver.problem/2", "$.format: is 'pipeweaver.problem/2'; this reader takes"),
    (("format",), 1, "$.format: is 1; it must be a string"),
    (("extra",), 1, "$: unknown key 'extra'; remove it"),
    (("pipeline_size",), REMOVE, "$: key 'pipeline_size' is missing; add it"),
    (("pipeline_size",), 0, "$.pipeline_size: is 0; it must be at least 1"),
    (("pipeline_size",), "2", '$.pipeline_size: is "2"; it must be a whole number'),
    (("pipeline_size",), 3, "$.memory_capacity_bytes: has 2 entries; it must have 3"),
    (("memory_capacity_bytes",), {}, "$.memory_capacity_bytes: is an object of 0; it must be an a"),
    (("memory_capacity_bytes", 1), -1, "$.memory_capacity_bytes[1]: is -1; it must be at least 0"),
    (("memory_capacity_bytes", 1), 0.5, "$.memory_capacity_bytes[1]: is 0.5; it must be a whole"),
    (("modules",), [], "$.modules: is an array of 0; it must be an object"),
    (("modules", "vision"), {}, "$.modules.vision: key 'segments' is missing; add it"),
    (("modules", "vision", "segments"), 0, "$.modules.vision.segments: is 0; it must be at least"),
    (("modules", "vision", "x"), 0, "$.modules.vision: unknown key 'x'; remove it"),
    (("modules", "vision", "segments"), 3, f"{AT_P0}.stages: has 4 entries; it must have 6"),
    (("modules", ""), {"segments": 1}, "$.microbatches: module '' has 1 segments"),
    (("microbatches",), {}, "$.microbatches: is an object of 0; it must be an array"),
    (("microbatches", 0), [], "$.microbatches[0]: is an array of 0; it must be an object"),
    (("microbatches", 0, "x"), 1, "$.microbatches[0]: unknown key 'x'; remove it"),
    ((*P0, "after"), REMOVE, f"{AT_P0}: key 'after' is missing; add it"),
    ((*P0, "x"), 1, f"{AT_P0}: unknown key 'x'; remove it"),
    ((*P0, "module"), "audio", f"{AT_P0}.module: is 'audio'; `modules` has ['language', 'vision']"),
    ((*P0, "sub_microbatch"), -1, f"{AT_P0}.sub_microbatch: is -1; it must be at least 0"),
    ((*P0, "sub_microbatch"), 1, "$.microbatches: microbatch 0, pass 'vision' sub-microbatch 1 st"),
    ((*P0, "sub_microbatch"), True, f"{AT_P0}.sub_microbatch: is true; it must be a whole number"),
    ((*P0, "after"), [["vision"]], f"{AT_P0}.after[0]: has 1 entries; it must have 2"),
    ((*P0, "after"), [["vision", 7]], "$.microbatches: microbatch 0, pass 'vision' sub-microbatch"),
    ((*P0, "after"), [["language", 0]], "$.microbatches: microbatch 0, pass"),
    ((*P2, "after", 0, 0), 5, "$.microbatches[0].passes[2].after[0][0]: is 5; it must be a string"),
    ((*P0, "p2p_latency_ns"), None, f"{AT_P0}.p2p_latency_ns: is null; it must be a whole number"),
    ((*P0, "frozen"), "no", f'{AT_P0}.frozen: is "no"; it must be true or false'),
    ((*P0, "stages"), [], f"{AT_P0}.stages: has 0 entries; it must have 4"),
    ((*P0, "stages", 1), {}, f"{AT_P0}.stages[1]: key 'strategies' is missing; add it"),
    ((*P0, "stages", 1, "strategies"), [], f"{AT_P0}: pass 'vision' sub-microbatch 0, stage 1: no"),
    ((*ONE, "name"), "recompute", f"{AT_P0}: pass 'vision' sub-microbatch 0, stage 1: strategy na"),
    ((*ONE, "name"), "", f"{AT_ONE}: strategy: the name is empty; give every strategy a name"),
    ((*ONE, "memory_bytes"), REMOVE, f"{AT_ONE}: key 'memory_bytes' is missing; add it"),
    ((*ONE, "latency"), 1, f"{AT_ONE}: unknown key 'latency'; remove it"),
    ((*ONE, "forward_ns"), -1, f"{AT_ONE}.forward_ns: is -1; it must be at least 0"),
    ((*ONE, "backward_ns"), 1.5, f"{AT_ONE}.backward_ns: is 1.5; it must be a whole number"),
    ((*ONE, "weight_grad_ns"), 2**63, f"{AT_ONE}.weight_grad_ns: is 9223372036854775808; it must"),
]

ROW = ("ranks", 1, 2)
SCHEDULE_REFUSALS = [
    (("format",), "pipeweaver.trace/1", "$.format: is 'pipeweaver.trace/1'; this reader takes"),
    (("makespan_ns",), REMOVE, "$: key 'makespan_ns' is missing; add it"),
    (("makespan_ns",), -1, "$.makespan_ns: is -1; it must be at least 0"),
    (("lower_bound_ns",), None, "$.lower_bound_ns: is null; it must be a whole number"),
    (("problem_sha256",), 0, "$.problem_sha256: is 0; it must be a string"),
    (("peak_memory_bytes",), [1], "$.peak_memory_bytes: has 1 entries; it must have 2"),
    (("peak_memory_bytes", 0), "1", '$.peak_memory_bytes[0]: is "1"; it must be a whole number'),
    (("ranks",), {}, "$.ranks: is an object of 0; it must be an array"),
    (("ranks", 1), 3, "$.ranks[1]: is 3; it must be an array"),
    ((*ROW, "op"), "FB", "$.ranks[1][2].op: is 'FB'; it must be F, B or W"),
    ((*ROW, "stage"), REMOVE, "$.ranks[1][2]: key 'stage' is missing; add it"),
    ((*ROW, "kind"), "compute", "$.ranks[1][2]: unknown key 'kind'; remove it"),
    ((*ROW, "microbatch"), -1, "$.ranks[1][2].microbatch: is -1; it must be at least 0"),
    ((*ROW, "end_ns"), 1.5, "$.ranks[1][2].end_ns: is 1.5; it must be a whole number"),
    ((*ROW, "strategy"), 1, "$.ranks[1][2].strategy: is 1; it must be a string"),
]

SEND = ("ranks", 0, 1)
TRACE_REFUSALS = [
    (("format",), "pipeweaver.schedule/1", "$.format: is 'pipeweaver.schedule/1'; this reader"),
    (("iteration",), "3", '$.iteration: is "3"; it must be a whole number'),
    (("hosts",), ["a"], "$.hosts: has 1 entries; it must have 2"),
    (("hosts", 1), 1, "$.hosts[1]: is 1; it must be a string"),
    (("plan_sha256",), None, "$.plan_sha256: is null; it must be a string"),
    ((*SEND, "kind"), "isend", "$.ranks[0][1].kind: is 'isend'; it must be one of ['compute', 's"),
    ((*SEND, "kind"), REMOVE, "$.ranks[0][1]: key 'kind' is missing; add it"),
    ((*SEND, "peer"), -1, "$.ranks[0][1].peer: is -1; it must be at least 0"),
    ((*SEND, "bytes"), 0.5, "$.ranks[0][1].bytes: is 0.5; it must be a whole number"),
    ((*SEND, "op"), "S", "$.ranks[0][1].op: is 'S'; it must be F, B or W"),
    ((*SEND, "tag"), 1, "$.ranks[0][1]: unknown key 'tag'; remove it"),
]


@pytest.mark.parametrize(
    ("which", "path", "value", "message"),
    [
        (which, *one)
        for which, refusals in (
            ("problem", PROBLEM_REFUSALS),
            ("schedule", SCHEDULE_REFUSALS),
            ("trace", TRACE_REFUSALS),
        )
        for one in refusals
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_refusals_name_file_path_and_mend(which, path, value, message):
    assert refusal(which, changed(which, path, value)).startswith(message)


@pytest.mark.parametrize("which", READERS)
@pytest.mark.parametrize("data", [b"", b"[]", b"3", b'"text"', b"null", b"{}"])
def test_other_json_is_refused(which, data):
    refusal(which, data)


def test_frozen_is_false_unless_given():
    text = json.loads(problem_to_json(problem()))
    first = text["microbatches"][1]["passes"][0]
    assert "frozen" not in first
    first["frozen"] = True
    frozen = problem_from_json(json.dumps(text).encode())
    assert frozen.microbatches[1].passes[0].frozen
    assert problem_from_json(problem_to_json(frozen)) == frozen


def test_other_peoples_layout_of_the_same_json_reads_the_same():
    value = VALUES["problem"]
    loose = json.dumps(dict(reversed(value.items())), indent=2).encode()
    assert problem_from_json(loose) == problem()
