import logging

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.tables import Measure, MeasuredTable
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Phase, Work

TABLE = MeasuredTable(
    measure=Measure.FLOPS, points={Phase.FORWARD: ((100, 10), (200, 30), (400, 40))}
)


def _operator(flops: int) -> Operator:
    return Operator(
        name="mine",
        kind=OperatorClass.MATMUL,
        inputs=(),
        outputs=(),
        forward=Work(flops=flops),
        input_grad=Work(flops=flops),
    )


@pytest.mark.parametrize(
    ("flops", "expected"), [(100, 10), (150, 20), (200, 30), (300, 35), (400, 40)]
)
def test_between_points_latency_is_a_line(flops: int, expected: int) -> None:
    assert TABLE(_operator(flops), Phase.FORWARD) == expected


@pytest.mark.parametrize("flops", [99, 401])
def test_outside_of_the_points_it_warns_and_leaves_it_to_semu(
    caplog: pytest.LogCaptureFixture, flops: int
) -> None:
    with caplog.at_level(logging.WARNING):
        assert TABLE(_operator(flops), Phase.FORWARD) is None
    assert f"{flops} flops lie outside the measured 100 to 400" in caplog.text


def test_phases_without_points_are_left_to_semu() -> None:
    assert TABLE(_operator(150), Phase.INPUT_GRAD) is None


@pytest.mark.parametrize(
    "points",
    [(), ((5, 1), (5, 2)), ((-1, 5),), ((float("nan"), 5),), ((5, float("nan")),), ((5, 1.5),)],
)
def test_broken_tables_are_refused(points: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="measured table"):
        MeasuredTable(measure=Measure.FLOPS, points={Phase.FORWARD: points})
