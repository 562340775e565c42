import gc
import json

import pytest

from megatron_pipeweaver.errors import ConfigError, PlanInvalidError
from megatron_pipeweaver.ir.plan import VerifiedPlan
from megatron_pipeweaver.planner.wire import WIRE_FORMAT, decode, encode, encode_failure
from tests.unit.planner.examples import batch_of, make_planner


@pytest.fixture(scope="module")
def planned():
    return make_planner().plan(batch_of(3, 0))


@pytest.fixture(scope="module")
def data(planned):
    return encode(planned, "the batch")


def with_header(data, **changes):
    head, _, body = data.partition(b"\n")
    header = {**json.loads(head), **changes}
    kept = {name: value for name, value in header.items() if value is not ...}
    return json.dumps(kept).encode() + b"\n" + body


def test_what_was_sent_arrives(planned, data):
    received = decode(data)
    assert isinstance(received.plan, VerifiedPlan)
    assert received.plan.plan == planned.plan.plan
    assert received.plan.fingerprint == planned.plan.fingerprint
    assert received.batch_digest == "the batch"
    assert received.baselines == planned.baselines
    assert received.lower_bound_ns == planned.schedule.lower_bound_ns
    assert received.bubble_ppm == round(planned.schedule.bubble() * 1e6)
    assert received.search_ns == planned.search_ns
    assert received.origin == planned.origin


def test_a_plan_of_an_evaluation_arrives():
    planned = make_planner().plan(batch_of(1, 4), forward_only=True)
    assert decode(encode(planned, "")).plan.plan == planned.plan.plan


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("no memory on rank 3", "no memory on rank 3"),
        ("", ""),
        ("two\nlines \u2028 and\ttabs", "two lines and tabs"),
        ("half \ud83d of a character", r"half \ud83d of a character"),
        ("mémoire 不足", "mémoire 不足"),
    ],
)
def test_a_failure_arrives_with_its_reason_on_one_line(reason, told):
    with pytest.raises(ConfigError) as caught:
        decode(encode_failure(reason))
    assert str(caught.value) == f"the planning rank has no plan: {told}"


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "not readable JSON"),
        (b"\n", "not readable JSON"),
        (b"null\n", "must be an object"),
        (b"[]\n{}", "must be an object"),
        (b"{}\n{}", "key 'format' is missing"),
        (b"\xff\xfe\n", "not readable JSON"),
        (b'{"failure":7}\n', "failure: is 7; it must be a string"),
        (b"[" * 100_000, "not readable JSON"),
    ],
)
def test_what_is_no_plan_is_refused(damaged, message):
    with pytest.raises(ConfigError, match=message):
        decode(damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pipeweaver.planned/2"}, f"this reader takes '{WIRE_FORMAT}'"),
        ({"batch_digest": ...}, "key 'batch_digest' is missing"),
        ({"more": 1}, "unknown key 'more'"),
        ({"origin": "guessed"}, "origin: is 'guessed'; it must be one of"),
        ({"search_ns": -1}, "search_ns: is -1"),
        ({"bubble_ppm": 0.5}, "bubble_ppm: is 0.5; it must be a whole number"),
        ({"baselines": {"1f1b": "fast"}}, "baselines.*must be a whole number"),
        ({"lower_bound_ns": 10**30}, "lower_bound_ns: .*below 2"),
    ],
)
def test_a_wrong_header_is_refused_with_its_place(data, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        decode(with_header(data, **changes), "plan of rank 0")
    assert str(caught.value).startswith("plan of rank 0: ")


def test_a_plan_that_breaks_a_rule_is_refused(data):
    head, _, body = data.partition(b"\n")
    plan = json.loads(body)
    plan["ranks"][0] = plan["ranks"][0][1:]
    with pytest.raises(PlanInvalidError, match="rank 0"):
        decode(head + b"\n" + json.dumps(plan).encode())


def test_a_plan_alone_is_no_message(data):
    with pytest.raises(ConfigError, match="this reader takes"):
        decode(data.partition(b"\n")[2])


def test_reading_a_plan_leaves_garbage_collection_to_whoever_runs_beside_it(monkeypatch, data):
    # Plans are read in threads; what one finds switched off, another may have switched off.
    for switch in ("disable", "enable", "freeze"):
        monkeypatch.setattr(gc, switch, lambda: pytest.fail("switched"))
    assert decode(data).plan is not None
