"""`verify`, held to its native twin: both say yes to the same plans, and find the same peaks."""

from __future__ import annotations

from megatron_pipeweaver.compiler.packed import PackedPlan, read_plan
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import ConfigError, PlanInvalidError
from megatron_pipeweaver.ir.plan import Plan, VerifiedPlan
from megatron_pipeweaver.ir.plan_codec import plan_to_json


def judged(plan: Plan) -> VerifiedPlan:
    """`verify(plan)`.

    Raises:
        PlanInvalidError: as `verify` does.
    """
    native = native_peaks(plan)
    try:
        verified = verify(plan)
    except PlanInvalidError:
        assert native is None, "the native core takes what verify refuses"
        raise
    assert native == verified.peak_memory_bytes, "the native core refuses what verify takes"
    return verified


def native_peaks(plan: Plan) -> tuple[int, ...] | None:
    """The peaks that the native core finds in `plan`'s bytes; `None` where it does not say yes."""
    try:
        packed = read_plan(plan_to_json(plan))
    except (ConfigError, PlanInvalidError):  # what no reader takes
        return None
    return packed.peak_memory_bytes() if isinstance(packed, PackedPlan) else None
