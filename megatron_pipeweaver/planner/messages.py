"""What a training process and its planner say to each other: a line of JSON, then bytes.

training ──► Launch, then PlanRequest, Hurry and Ran
planner  ──► Ready, then Answer, Failure and Learnt
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.codec import to_bytes
from megatron_pipeweaver.ir.json_reader import parse_json
from megatron_pipeweaver.planner.codec import from_json, to_json
from megatron_pipeweaver.planner.feedback import CorrectionRow, StageTime
from megatron_pipeweaver.planner.headroom import MemoryPeak
from megatron_pipeweaver.planner.settings import PlannerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Everything a planner's process starts from.

    `rows` and `usable_permille` are what an earlier process learnt; with `details`, answers carry
    the problem and the schedule behind a plan; `memory_limit_bytes` bounds the process's memory.
    """

    settings: PlannerSettings
    rows: tuple[CorrectionRow, ...] = ()
    usable_permille: tuple[int, ...] = ()
    details: bool = False
    memory_limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Plan `batch`, within `budget_ns`; the answer carries `number`."""

    number: int
    batch: BatchMetadata
    forward_only: bool
    budget_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurry:
    """Answer all requests up to `number` with the best found so far; it has no answer itself."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How long the stages of `batch` took, and the memory peak of every rank where known."""

    batch: BatchMetadata
    forward_only: bool
    times: tuple[StageTime, ...]
    peaks: tuple[MemoryPeak, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """An iteration has run; what it measured is for the planner's process to make out.

    Behind it come `sizes` bytes: the plan that ran and, rank by rank, when its actions ran
    (`ir.trace.ActionTimes`). Nothing is learnt from its passes `unlike` those planned for `batch`.
    """

    batch: BatchMetadata
    forward_only: bool
    unlike: tuple[int, ...]
    peaks: tuple[MemoryPeak, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The planner has read its settings."""

    process: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The plan that `number` asked for.

    Behind it come `sizes` bytes: the plan for the wire and, with details, problem and schedule.
    """

    number: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no plan for `number`."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What measured times and memory have taught.

    `error_permille` is the median error of the stage times that the last measured plan was made
    with; `rows` are the corrections from now on, `usable_permille` what plans use of each rank's
    memory.
    """

    error_permille: int
    rows: tuple[CorrectionRow, ...]
    usable_permille: tuple[int, ...] = ()


Message = Launch | PlanRequest | Hurry | Ran | Measurement | Ready | Answer | Failure | Learnt

_KINDS: Mapping[str, type[Message]] = {
    "launch": Launch,
    "plan": PlanRequest,
    "hurry": Hurry,
    "ran": Ran,
    "measured": Measurement,
    "ready": Ready,
    "answer": Answer,
    "failure": Failure,
    "learnt": Learnt,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def pack(message: Message, *parts: bytes) -> bytes:
    """`message` as bytes, `parts` behind it."""
    head = to_bytes({"kind": _NAMES[type(message)], "value": to_json(message)})
    return b"".join((head, *parts))


def unpack(data: bytes) -> tuple[Message, bytes]:
    """The message in `data`, and what stands behind it.

    Raises:
        ConfigError: the bytes are no message.
    """
    head, _, rest = data.partition(b"\n")
    root = parse_json(head, "planner message").keys(frozenset({"kind", "value"}))
    kind = root["kind"].text()
    if kind not in _KINDS:
        root["kind"].fail(f"is {kind!r}; it must be one of {sorted(_KINDS)}")
    message: Message = from_json(root["value"], _KINDS[kind])
    return message, rest


def split_parts(sizes: tuple[int, ...], data: bytes) -> tuple[bytes, ...]:
    """`data` cut into parts of these sizes.

    Raises:
        ConfigError: it is longer or shorter than they.
    """
    if sum(sizes) != len(data):
        raise ConfigError(
            f"planner message: {len(data)} bytes behind an answer of {sum(sizes)}; ask again"
        )
    parts, start = [], 0
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    return tuple(parts)
