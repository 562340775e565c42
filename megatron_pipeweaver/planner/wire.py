"""A planned iteration as bytes: what the planning rank sends to the others of its pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pipeweaver.compiler.packed import read_plan
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import check_format, to_bytes
from megatron_pipeweaver.ir.json_reader import JsonNode, parse_json
from megatron_pipeweaver.ir.plan import VerifiedPlan
from megatron_pipeweaver.ir.plan_codec import plan_to_json
from megatron_pipeweaver.planner.planner import PlannedIteration, PlanOrigin

WIRE_FORMAT = "pipeweaver.planned/1"
SENT_AHEAD = to_bytes({"format": WIRE_FORMAT, "ahead": True})
"""In place of a plan: it is the one that went to all ranks while they trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedPlan:
    """What a rank knows of an iteration before it runs it.

    `baselines` and `search_ns` are as in `PlannedIteration`, `bubble` is the schedule's idle share
    in millionths.
    """

    plan: VerifiedPlan
    batch_digest: str
    baselines: Mapping[str, int]
    lower_bound_ns: int
    bubble_ppm: int
    search_ns: int
    origin: PlanOrigin


def encode(planned: PlannedIteration, batch_digest: str) -> bytes:
    """`planned`, made for the batch with `batch_digest`, as bytes: a header line, then the plan."""
    header = {
        "format": WIRE_FORMAT,
        "batch_digest": batch_digest,
        "baselines": dict(planned.baselines),
        "lower_bound_ns": planned.schedule.lower_bound_ns,
        "bubble_ppm": round(planned.schedule.bubble() * 1_000_000),
        "search_ns": planned.search_ns,
        "origin": planned.origin.value,
    }
    return to_bytes(header) + plan_to_json(planned.plan.plan)


def plan_bytes(data: bytes) -> bytes:
    """The plan alone in what `encode` made."""
    return data.partition(b"\n")[2]


def encode_failure(reason: str) -> bytes:
    """`reason` why there is no plan, on one line, for the ranks that wait for one.

    Takes any text: an error that came from elsewhere may span lines, or hold half of a character.
    """
    line = " ".join(reason.split()).encode(errors="backslashreplace").decode()
    return to_bytes({"format": WIRE_FORMAT, "failure": line})


def decode(data: bytes, source: str = "plan from the planning rank") -> ReceivedPlan:
    """The plan in `data`, verified anew on this rank.

    Raises:
        ConfigError: the bytes are damaged, or tell why planning failed.
        PlanInvalidError: the plan breaks a rule.
    """
    head, newline, body = data.partition(b"\n")
    root = parse_json(head, source)
    if newline and (failure := root.get("failure")) is not None:
        raise ConfigError(f"the planning rank has no plan: {failure.text()}")
    check_format(
        root,
        WIRE_FORMAT,
        {"batch_digest", "baselines", "lower_bound_ns", "bubble_ppm", "search_ns", "origin"},
    )
    plan = verify(read_plan(body, source))
    return ReceivedPlan(
        plan=plan,
        batch_digest=root["batch_digest"].text(),
        baselines={name: node.integer() for name, node in root["baselines"].entries()},
        lower_bound_ns=root["lower_bound_ns"].integer(),
        bubble_ppm=root["bubble_ppm"].integer(),
        search_ns=root["search_ns"].integer(),
        origin=_origin(root["origin"]),
    )


def _origin(node: JsonNode) -> PlanOrigin:
    name = node.text()
    if name not in [one.value for one in PlanOrigin]:
        node.fail(f"is {name!r}; it must be one of {[one.value for one in PlanOrigin]}")
    return PlanOrigin(name)
