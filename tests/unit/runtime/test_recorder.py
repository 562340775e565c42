"""The recorder: rows on its own clock, and what it calls on the way."""

from __future__ import annotations

from itertools import count

from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.ir.trace import TraceKind, TraceRow
from megatron_pipeweaver.runtime.recorder import Recorder


def test_rows_count_from_the_start() -> None:
    ticks = count(100, 10)
    entered: list[int] = []
    finished: list[str] = []
    recorder = Recorder(
        3,
        "ab",
        clock=lambda: next(ticks),
        synchronize=lambda: finished.append("device"),
        on_action=entered.append,
    )
    recorder.start()  # at 110
    op = parse_op("vision0.F3")
    recorder.leave(recorder.enter(0), TraceKind.COMPUTE, op, strategy="keep")
    recorder.leave(recorder.enter(1), TraceKind.SEND, op, peer=1, size_bytes=24)
    assert recorder.rows == (
        TraceRow(kind=TraceKind.COMPUTE, key=op, strategy="keep", start_ns=10, end_ns=20),
        TraceRow(
            kind=TraceKind.SEND, key=op, strategy="", start_ns=30, end_ns=40, peer=1, size_bytes=24
        ),
    )
    assert entered == [0, 1]
    assert finished == ["device", "device"]
