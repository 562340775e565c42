"""What an iteration measured, on its way from training to the planner's process.

Training sends what it has, the plan's bytes and when its actions ran; the process makes out what
stages took. So training packs next to nothing.
"""

from __future__ import annotations

from array import array

from megatron_pipeweaver.compiler.packed import PackedPlan, read_plan
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.plan_codec import plan_to_json
from megatron_pipeweaver.ir.trace import TIME_CODE, trace_rows
from megatron_pipeweaver.planner.feedback import stage_times
from megatron_pipeweaver.planner.messages import Measurement, Ran, pack, split_parts
from megatron_pipeweaver.planner.sharing import planned_larger
from megatron_pipeweaver.planner.source import RanPlan
from megatron_pipeweaver.planner.wire import plan_bytes


def pack_ran(batch: BatchMetadata, forward_only: bool, ran: RanPlan) -> bytes:
    """The message that tells of `ran`, an iteration with `batch`."""
    whole = ran.own is ran.made
    parts = (
        plan_bytes(ran.answer.data) if whole else plan_to_json(ran.own.plan),
        *ran.times.spans,
    )
    message = Ran(
        batch=batch,
        forward_only=forward_only,
        unlike=() if whole else planned_larger(ran.made.plan, ran.own.plan),
        peaks=ran.peaks,
        sizes=tuple(map(len, parts)),
    )
    return pack(message, *parts)


def measurement_of(ran: Ran, data: bytes) -> Measurement:
    """What was measured in an iteration that `ran`; `data` stands behind the message.

    Raises:
        ConfigError: the bytes are damaged.
    """
    plan_data, *spans = split_parts(ran.sizes, data)
    read = read_plan(plan_data)
    plan = read.plan if isinstance(read, PackedPlan) else read
    unlike = {plan.passes[index].key for index in ran.unlike}
    rows = (
        row
        for rank, span in enumerate(spans)
        for row in trace_rows(plan, rank, array(TIME_CODE, span))
    )
    return Measurement(
        batch=ran.batch,
        forward_only=ran.forward_only,
        times=stage_times(row for row in rows if row.key.owner not in unlike),
        peaks=ran.peaks,
    )
