"""The golden file is written by ``python -m tests.unit.view.test_svg``; look at it before."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.view.layout import draw_schedule, draw_trace
from megatron_pipeweaver.view.svg import render_svg
from tests.unit.ir.examples import problem, schedule, trace

GOLDEN = Path(__file__).parents[2] / "golden" / "timeline.svg"
SVG = "{http://www.w3.org/2000/svg}"


def small_drawing():
    milli = 1_000_000
    ranks = tuple(
        tuple(replace(op, start_ns=op.start_ns * milli, end_ns=op.end_ns * milli) for op in rank)
        for rank in schedule().ranks
    )
    slow = replace(schedule(), ranks=ranks, makespan_ns=50 * milli, lower_bound_ns=40 * milli)
    return draw_schedule(slow, problem(), title="Two ranks, one microbatch")


def many_ops(count, modules=("vision",), ranks=2):
    """`count` ops back to back on every rank, with growing times and gaps between them."""
    rows = []
    for rank in range(ranks):
        start, row = 7 * rank, []
        for index in range(count):
            kind = (OpKind.F, OpKind.B, OpKind.W)[index % 3]
            key = OpKey(kind, index // 3, modules[index % len(modules)], index % 2, rank)
            end = start + 5 + index % 11
            row.append(ScheduledOp(key=key, strategy="keep", start_ns=start, end_ns=end))
            start = end + index % 3
        rows.append(tuple(row))
    return Schedule(
        problem_sha256="",
        makespan_ns=max(row[-1].end_ns for row in rows),
        lower_bound_ns=0,
        peak_memory_bytes=(0,) * ranks,
        ranks=tuple(rows),
    )


def boxes(svg):
    """Every op's rectangle as (left, top, width, height, title)."""
    root = ElementTree.fromstring(svg)
    return [
        (*(float(rect.get(name)) for name in ("x", "y", "width", "height")), title.text)
        for rect in root.iter(f"{SVG}rect")
        if (title := rect.find(f"{SVG}title")) is not None and re.search(r"\d\.[FBW]\d", title.text)
    ]


def test_golden():
    assert render_svg(small_drawing()) == GOLDEN.read_bytes()


def test_every_op_is_a_box_within_the_plot_and_none_overlap():
    drawing = draw_schedule(many_ops(40, ("vision", "language")))
    found = boxes(render_svg(drawing))
    assert len(found) == 80
    for rank in range(2):
        row = found[40 * rank : 40 * rank + 40]
        assert len({top for _, top, _, _, _ in row}) == 1
        for (left, _, width, _, _), (after, _, _, _, _) in pairwise(row):
            assert left + width <= after + 0.011  # coordinates are told in hundredths
        assert min(left for left, *_ in row) >= 74
        assert max(left + width for left, _, width, *_ in row) <= 1200 - 112 + 0.01


def test_widths_are_in_proportion_to_time():
    found = boxes(render_svg(small_drawing()))
    widths = {title.split(":")[0]: width for _, _, width, _, title in found}
    pixels_per_ms = (1200 - 74 - 112) / 50
    assert widths["language0.F0"] == pytest.approx(10 * pixels_per_ms, abs=0.7)
    assert widths["language1.W0"] == pytest.approx(8 * pixels_per_ms, abs=0.7)


@pytest.mark.parametrize("count", [6, 60, 400])
def test_labels_stand_only_where_they_fit(count):
    svg = render_svg(draw_schedule(many_ops(count)))
    root = ElementTree.fromstring(svg)
    labels = [
        (float(one.get("x")), len(one.text))
        for one in root.iter(f"{SVG}text")
        if (one.get("class") or "").startswith("n")
    ]
    assert bool(labels) == (count < 400)
    for x, length in labels:
        assert any(
            left <= x - 3 * length and x + 3 * length <= left + width
            for left, _, width, _, _ in boxes(svg)
        )


def test_bytes_are_the_same_every_time_and_load_nothing():
    svg = render_svg(small_drawing())
    assert svg == render_svg(small_drawing())
    outside = svg.replace(b'xmlns="http://www.w3.org/2000/svg"', b"")
    assert not re.search(rb"https?:|<script|<image|@import|href", outside)


def test_odd_names_and_many_modules_make_good_xml():
    names = tuple(f"<m&{index}\x00\ud7ff\uffff\"'>" for index in range(12))
    svg = render_svg(draw_schedule(many_ops(24, names), title="a < b & \x1b"))
    root = ElementTree.fromstring(svg)
    assert root.find(f"{SVG}title").text == "a < b & ?"
    assert len(boxes(svg)) == 48


def test_memory_curves_follow_their_steps_below_the_capacity():
    svg = render_svg(small_drawing()).decode()
    assert svg.count('class="l"') == 2  # one curve per rank
    assert "peak 4 B" in svg
    assert "↑ 100 B" in svg  # far above 4 bytes: off the scale, and said so
    near = replace(problem(), memory_capacity_bytes=(4, 5))
    assert "↑" not in render_svg(draw_schedule(schedule(), near)).decode()


def test_a_trace_shows_its_messages():
    svg = render_svg(draw_trace(trace())).decode()
    assert '<rect class="send"' in svg
    assert "64 B" in svg


@pytest.mark.parametrize("ranks", [(), ((),), ((), ())])
def test_an_empty_schedule_is_a_picture_too(ranks):
    empty = replace(
        schedule(),
        makespan_ns=0,
        lower_bound_ns=0,
        ranks=ranks,
        peak_memory_bytes=(0,) * len(ranks),
    )
    assert boxes(render_svg(draw_schedule(empty))) == []


@pytest.mark.parametrize("end_ns", [1, 999, 10**6, 123_456_789, 7 * 10**11])
def test_the_time_axis_has_a_handful_of_round_ticks(end_ns):
    one = schedule().ranks[0][0]
    long = replace(schedule(), makespan_ns=end_ns, ranks=((replace(one, end_ns=end_ns),),))
    root = ElementTree.fromstring(render_svg(draw_schedule(long)))
    ticks = [one.text for one in root.iter(f"{SVG}text") if one.get("class") == "s m"]
    assert ticks[0].strip("0.") == ""
    assert 2 <= len(ticks) <= 13
    assert len(set(ticks)) == len(ticks)


if __name__ == "__main__":
    GOLDEN.write_bytes(render_svg(small_drawing()))
