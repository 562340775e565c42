"""The native reader reads what Python's reads, and refuses what is not spelled as Python would."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.compiler.packed import PackedPlan, read_plan
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.plan import Plan
from megatron_pipeweaver.ir.plan_codec import fingerprint, plan_from_json, plan_to_json
from tests.unit.compiler.samples import draw_sample

SEEDS = st.integers(0, 2**32 - 1)


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with some bytes changed, left out, doubled, or put in from elsewhere in it."""
    at = rng.randrange(len(data))
    length = rng.choice([0, 1, 1, 1, 2, 5, 40])
    start = rng.randrange(len(data))
    instead = rng.choice(
        [
            b"",
            bytes([rng.randrange(256)]),
            rng.choice([b"0", b"00", b"9", b"-", b" ", b".", b":", b"[]", b",", b"true", b"1e3"]),
            data[start : start + rng.choice([1, 2, 10, 60])],
        ]
    )
    return data[:at] + instead + data[at + length :]


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_a_plan_is_the_same_by_both_readers(seed: int) -> None:
    rng = random.Random(seed)
    plan = draw_sample(rng).plan(forward_only=rng.random() < 0.2)
    data = plan_to_json(plan)
    packed = read_plan(data)
    assert isinstance(packed, PackedPlan)
    assert packed.plan == plan
    assert packed.fingerprint == fingerprint(plan)
    for _ in range(20):
        damaged = _damaged(data, rng)
        try:
            read = read_plan(damaged)
        except ConfigError:  # both have refused it
            continue
        if isinstance(read, PackedPlan):
            again = plan_from_json(damaged)
            assert read.plan == again
            assert plan_to_json(again) == damaged, (
                "bytes that are not canonical have no fingerprint"
            )
        else:
            assert isinstance(read, Plan)
