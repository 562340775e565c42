"""The action grid: words that do not fit the plan are refused by name."""

from __future__ import annotations

import random

import pytest

from megatron_pipeweaver.compiler.grid import format_actions, parse_actions
from megatron_pipeweaver.errors import ConfigError
from tests.unit.compiler.samples import draw_sample

PLAN = draw_sample(random.Random(3), pipeline_size=2, microbatches=1).plan()


def test_the_grid_reads_back() -> None:
    text = format_actions(PLAN)
    assert parse_actions(text, PLAN) == PLAN
    assert "audio0.SEND_F0.1>1#1" in text
    assert "audio3.WAIT_RECV_B0.1<0#6" in text
    assert "audio1.F0.1[recompute]" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("audio0.SEND_F0>1#0", "audio0.SEND_F0>1#99", "names a message that the plan does not"),
        ("audio0.SEND_F0>1#0", "audio0.SEND_F0", "is not an action; write it like"),
        ("audio0.F0[keep]", "audio0.F0[other]", "has no such stage pair and strategy"),
        ("audio0.F0[keep]", "audio0.F9[keep]", "has no such stage pair and strategy"),
        ("rank 1", "rank 2", "must begin with 'rank 1 |'"),
    ],
)
def test_words_that_do_not_fit_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        parse_actions(format_actions(PLAN).replace(old, new), PLAN)


def test_a_missing_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 lines; the plan has 2 ranks"):
        parse_actions(format_actions(PLAN).splitlines()[0], PLAN)
