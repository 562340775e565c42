"""Headroom is learnt from measured peaks: in integers, from plans that tell, never too little."""

from __future__ import annotations

import dataclasses
import random

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.planner.headroom import KEPT, Headroom, MemoryPeak, usable_bytes
from megatron_pipeweaver.planner.messages import Learnt, Measurement, pack, unpack
from megatron_pipeweaver.planner.process import PlanningDesk
from tests.unit.planner.examples import batch_of, make_settings

CAPACITY = 1_000_000
BATCH, SETTINGS = batch_of(2, 0, 3), make_settings()


def peak(planned: int, measured: int) -> MemoryPeak:
    return MemoryPeak(planned_bytes=planned, measured_bytes=measured)


def learnt(*peaks: MemoryPeak, capacity: int = CAPACITY) -> int:
    headroom = Headroom((capacity,))
    for one in peaks:
        headroom.add((one,))
    (permille,) = headroom.usable_permille()
    return permille


def test_all_is_usable_until_something_else_is_measured() -> None:
    assert Headroom((5, 0)).usable_permille() == (1000, 1000)
    assert learnt(peak(500_000, 500_000), peak(900_000, 600_000)) == 1000
    assert usable_bytes((7, 9)) == (7, 9)


def test_what_was_known_before_holds_until_a_plan_tells() -> None:
    headroom = Headroom((CAPACITY,), (800,))
    headroom.add((peak(1000, 900_000),))  # a tiny plan, and much work space
    assert headroom.usable_permille() == (800,)
    headroom.add((peak(900_000, 900_000),))
    assert headroom.usable_permille() == (1000,)


def test_large_plans_count_and_small_ones_beside_them_do_not() -> None:
    assert learnt(peak(200_000, 400_000)) == 500
    assert learnt(peak(200_000, 400_000), peak(500_000, 550_000)) == 909
    assert learnt(peak(400_000, 500_000), peak(500_000, 550_000)) == 800


def test_half_of_the_capacity_stays_usable() -> None:
    assert learnt(peak(500_000, 10**12)) == 500


@pytest.mark.parametrize("seed", range(20))
def test_capacity_is_kept_from_the_second_iteration_on(seed: int) -> None:
    """The device adds a share and some work space that the plans do not know."""
    rng = random.Random(seed)
    share, work = rng.uniform(0.9, 1.3), rng.randrange(0, 100_000)
    headroom = Headroom((CAPACITY,))
    most = 0
    for iteration in range(10):
        (permille,) = headroom.usable_permille()
        (usable,) = usable_bytes((CAPACITY,), (permille,))
        planned = int(usable * (rng.uniform(0.3, 1) if iteration else rng.uniform(0.3, 0.65)))
        measured = int(share * planned) + work
        assert measured <= CAPACITY, iteration
        most = max(most, planned)
        headroom.add((peak(planned, measured),))
    assert most > CAPACITY // 3


def test_only_the_latest_iterations_count() -> None:
    later = [peak(800_000, 800_000)] * KEPT
    assert learnt(peak(800_000, 1_600_000), *later[1:]) == 500
    assert learnt(peak(800_000, 1_600_000), *later) == 1000


def test_peaks_of_another_pipeline_are_refused() -> None:
    headroom = Headroom((1, 2))
    headroom.add(())
    with pytest.raises(ConfigError, match="1 of a pipeline of 2 ranks; give one per rank"):
        headroom.add((peak(1, 1),))
    with pytest.raises(ConfigError, match="measured -1 bytes"):
        peak(0, -1)


def test_planners_that_are_told_the_same_plan_in_the_same_memory() -> None:
    capacity = SETTINGS.memory_capacity_bytes
    peaks = tuple(peak(one, one + one // 4) for one in capacity)
    told = Measurement(batch=BATCH, forward_only=False, times=(), peaks=peaks)
    answers = [PlanningDesk(SETTINGS).answer(unpack(pack(told))[0]) for _ in range(2)]
    assert answers[0] == answers[1]
    message, _ = unpack(answers[0])
    assert isinstance(message, Learnt)
    assert message.usable_permille == (800,) * len(capacity)
    # A process that starts anew starts from there.
    again = PlanningDesk(SETTINGS, usable_permille=message.usable_permille)
    less = SETTINGS.make(usable_permille=again.usable_permille).plan(BATCH).plan.plan
    assert less.memory_capacity_bytes == usable_bytes(capacity, message.usable_permille)


def test_a_message_with_a_broken_peak_is_refused() -> None:
    told = Measurement(batch=BATCH, forward_only=False, times=(), peaks=(peak(1, 2),))
    broken = pack(told).replace(b'"measured_bytes":2', b'"measured_bytes":-2')
    with pytest.raises(ConfigError, match="measured"):
        unpack(broken)
    assert dataclasses.is_dataclass(unpack(pack(told))[0])
