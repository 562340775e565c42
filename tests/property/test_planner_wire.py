"""Damaged plans: each a plain refusal, or a plan that differs and passes the verifier."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError, PlanInvalidError
from megatron_pipeweaver.planner.wire import ReceivedPlan, decode, encode, encode_failure
from tests.unit.planner.examples import batch_of, make_planner


@functools.cache
def sent() -> bytes:
    return encode(make_planner().plan(batch_of(3, 0)), "0123456789abcdef")


def known(received: ReceivedPlan) -> tuple[Any, ...]:
    """All that a rank learns from a message."""
    return (
        received.plan.fingerprint,
        received.batch_digest,
        received.baselines,
        received.lower_bound_ns,
        received.bubble_ppm,
        received.search_ns,
        received.origin,
    )


def read(data: bytes) -> ReceivedPlan | None:
    """What `data` says, or `None` where it was refused as it should be."""
    try:
        return decode(data)
    except PipeWeaverError as error:
        refusal = error
    text = str(refusal)
    if isinstance(refusal, PlanInvalidError):  # shows the actions around the fault, below
        text = text.partition("\n")[0]
    assert len(text.splitlines()) == 1
    return None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_truncated_message_is_refused(data: st.DataObject) -> None:
    # Without its last byte, a line break, the message still is whole.
    length = data.draw(st.integers(0, len(sent()) - 2))
    with pytest.raises(ConfigError):
        decode(sent()[:length])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_byte_is_refused_or_changes_what_is_read(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(sent()) - 2))
    byte = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789"[]{},:FBW.'))
    assume(byte != sent()[at])
    received = read(sent()[:at] + bytes([byte]) + sent()[at + 1 :])
    assert received is None or known(received) != known(decode(sent()))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode()))
def test_garbage_is_refused(garbage: bytes) -> None:
    assert read(garbage) is None
    assert read(sent().partition(b"\n")[0] + b"\n" + garbage) is None
    assert read(garbage + sent()) is None or not garbage.strip()


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path]
    for key, one in inside:
        if isinstance(one, dict | list):
            found += nodes(one, (*path, key))
        else:
            found.append((*path, key))
    return found


@functools.cache
def parts() -> tuple[str, str]:
    head, body = sent().decode().splitlines()
    return head, body


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 7)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, 10**40, 0.5, -0.0])
    | st.sampled_from(["", "F", "keep", "vision", "language0.B1", "vision0.F0.1", "isend", "\n"])
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_value_is_refused_or_changes_what_is_read(data: st.DataObject) -> None:
    trees = [json.loads(part) for part in parts()]
    tree = data.draw(st.sampled_from(trees))
    path = data.draw(st.sampled_from(nodes(tree)[1:]))
    place = tree
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    how = data.draw(st.sampled_from(["replace", "drop", "repeat"]))
    if how == "replace":
        new = data.draw(values)
        assume(json.dumps(new) != json.dumps(old))
        place[path[-1]] = new
    elif how == "drop" or isinstance(place, dict):
        del place[path[-1]]
    else:
        place.insert(path[-1], old)
    received = read("\n".join(map(json.dumps, trees)).encode())
    assert received is None or known(received) != known(decode(sent()))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None), max_size=40))
def test_any_reason_reaches_the_other_ranks_on_one_line(reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(encode_failure(reason))
    assert len(str(caught.value).splitlines()) == 1
