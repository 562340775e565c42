from dataclasses import replace

from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow
from megatron_pipeweaver.view.report import (
    Progress,
    ScheduleRow,
    comparison_table,
    format_table,
    planned_against_measured,
    progress_line,
    schedule_facts,
)
from tests.unit.ir.examples import problem, schedule

ROWS = [
    ScheduleRow(name="pipeweaver", makespan_ns=110_000_000, bubble=0.1, peak_memory_bytes=2**30),
    ScheduleRow(name="1F1B", makespan_ns=143_000_000, bubble=0.3, peak_memory_bytes=2**29),
]


def test_comparison_to_the_bound():
    assert comparison_table(ROWS, lower_bound_ns=100_000_000).splitlines() == [
        "schedule    makespan  / bound  bubble  peak memory",
        "--------------------------------------------------",
        "pipeweaver  110.0 ms   1.1000  10.0 %      1.0 GiB",
        "1F1B        143.0 ms   1.4300  30.0 %      512 MiB",
    ]


def test_comparison_to_the_first_row_without_a_bound():
    lines = comparison_table(ROWS).splitlines()
    assert "/ pipeweaver" in lines[0]
    assert " 1.3000 " in lines[3]
    assert len(comparison_table([]).splitlines()) == 2


def test_a_row_of_a_schedule():
    row = ScheduleRow.of("x", replace(schedule(), peak_memory_bytes=(3, 9)))
    assert (row.name, row.makespan_ns, row.peak_memory_bytes) == ("x", 50, 9)


def test_columns_after_the_first_stand_to_the_right():
    assert format_table(["a", "bb"], [["xyz", "1"]]) == "a    bb\n-------\nxyz   1"


def test_the_progress_line_tells_everything_on_one_line():
    line = progress_line(
        Progress(
            iteration=7,
            iterations=200,
            loss=2.30259,
            items=[0, 12, 3],
            planned_ns=812_300_000,
            measured_ns=845_100_000,
            search_ns=120_000_000,
            bubble=0.123,
        )
    )
    assert line == (
        "iteration   7/200 | loss  2.3026 | images  0 12  3 | planned   812.3 ms | "
        "measured   845.1 ms | search 120.0 ms | bubble 12.3 %"
    )


def test_the_progress_line_of_a_rank_without_a_loss():
    progress = Progress(
        iteration=1,
        iterations=9,
        loss=None,
        items=[],
        planned_ns=0,
        measured_ns=0,
        search_ns=0,
        bubble=0.0,
    )
    assert "loss       - | clips" in progress_line(progress, items_name="clips")


def test_facts_of_a_schedule():
    assert schedule_facts(schedule(), problem()).splitlines() == [
        "makespan      0.000 ms (50 ns)",
        "lower bound   0.000 ms (40 ns)",
        "gap           25.0 %",
        "bubble        48.0 %",
        "peak memory   rank 0: 4 B of 100 B",
        "              rank 1: 4 B of 90 B",
    ]
    bare = replace(schedule(), lower_bound_ns=0, peak_memory_bytes=(0, 0))
    assert "bound" not in schedule_facts(bare)
    assert "memory" not in schedule_facts(bare)


def test_planned_against_measured():
    rows = tuple(
        tuple(
            TraceRow(
                kind=TraceKind.COMPUTE,
                key=op.key,
                strategy=op.strategy,
                start_ns=2 * op.start_ns,
                end_ns=2 * op.end_ns,
            )
            for op in rank
        )
        for rank in schedule().ranks
    )
    measured = Trace(iteration=0, plan_sha256="", hosts=("a", "a"), ranks=rows)
    text = planned_against_measured(schedule(), measured)
    ops, ranks = text.split("\n\n")
    assert [line.split()[0:2] for line in ops.splitlines()[2:]] == [
        ["language", "forward"],
        ["language", "backward"],  # with the weight gradient, split off or not
    ]
    assert [line.split()[0] for line in ranks.splitlines()[2:]] == ["rank", "rank", "iteration"]
    assert [line.split()[-1] for line in text.splitlines() if "ms" in line] == ["2.000"] * 5


def test_what_was_not_measured_is_a_dash():
    nothing = Trace(iteration=0, plan_sha256="", hosts=("a",), ranks=((),))
    text = planned_against_measured(schedule(), nothing)
    assert [line.split()[-2:] for line in text.splitlines() if line.startswith("lang")] == [
        ["-", "-"],
        ["-", "-"],
    ]
