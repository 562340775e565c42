"""What each pipeline rank does, in order: actions that carry every shape they need.

Plans travel between ranks as bytes (`ir.codec`), are compared by fingerprint, and run only as a
`VerifiedPlan`, which `compiler.verify.verify` alone makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassGraph, PassKey, PassNode

ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Element types that cross rank borders, by torch's name."""


class ActionKind(StrEnum):
    """The executor's whole instruction set (paper, section 6, plus the weight gradient)."""

    FW_STAGE = "fw_stage"
    BW_STAGE = "bw_stage"
    WG_STAGE = "wg_stage"
    ISEND = "isend"
    IRECV = "irecv"
    WAIT_ISEND = "wait_isend"
    WAIT_IRECV = "wait_irecv"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPayload:
    """What a pass works on, and the shapes that it hands on.

    `item_start:item_stop` is its share of the microbatch's items of its module (the backbone's
    share is every sample). `hidden_shape` crosses between its own stages, `output_shape` leaves
    its last stage; both as the tensors are laid out, ``[sequence, batch, width]`` in Megatron.
    """

    item_start: int
    item_stop: int
    hidden_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.item_start <= self.item_stop:
            raise ConfigError(
                f"pass payload: items {self.item_start}:{self.item_stop} run backward"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPass:
    """One pass of the plan: the structure that its ops hang in, and its payload."""

    key: PassKey
    stages: int
    after: tuple[PassKey, ...]
    frozen: bool
    payload: PassPayload


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One tensor on its way from the stage of `source` to the stage of `target`.

    Both are ``F`` ops for an activation and ``B`` ops for a gradient. `sequence` numbers the
    messages of one directed rank pair in the order in which both ends post them; with it, a
    message never needs more than (source rank, target rank, sequence) to be told from others.
    """

    source: OpKey
    target: OpKey
    source_rank: int
    target_rank: int
    sequence: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Payload in bytes."""
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeAction:
    """Run one op of one stage, under `strategy`.

    `memory_bytes` is what the stage pair holds under it from the start of its forward to the end
    of its backward (or of its weight gradient where that is split off).
    """

    kind: ActionKind
    op: OpKey
    strategy: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferAction:
    """Post or await messages, by their indices in `Plan.messages`.

    Several messages are a *group*: of one directed rank pair, in the order of their numbers, posted
    as one on both ends. None of them has arrived before all have. Waits name one message each.
    """

    kind: ActionKind
    messages: tuple[int, ...]


Action = ComputeAction | TransferAction

COMPUTE_KIND: Mapping[OpKind, ActionKind] = {
    OpKind.F: ActionKind.FW_STAGE,
    OpKind.B: ActionKind.BW_STAGE,
    OpKind.W: ActionKind.WG_STAGE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One iteration of one pipeline, ready to be verified and run.

    `ranks[r]` are the actions of pipeline rank r. `makespan_ns` is the emulated iteration time;
    `modules` maps a module to its segments in forward order, as in the problem. A plan whose
    `forward_only` is set holds no ``B`` and no ``W`` (evaluation). Messages and actions are tuples,
    or `compiler.packed.Rows`, which equal them.
    """

    pipeline_size: int
    modules: Mapping[str, int]
    forward_only: bool
    memory_capacity_bytes: tuple[int, ...]
    makespan_ns: int
    passes: tuple[PlanPass, ...]
    messages: Sequence[Message]
    ranks: Sequence[Sequence[Action]]

    def graph(self) -> PassGraph:
        """The passes as `ir.problem.dependencies` reads them (latencies are zero here)."""
        return PassGraph(
            self.pipeline_size,
            (
                PassNode(
                    key=one.key,
                    stages=one.stages,
                    after=one.after,
                    frozen=one.frozen or self.forward_only,
                    p2p_latency_ns=0,
                )
                for one in self.passes
            ),
        )


class VerifiedPlan:
    """A plan that `compiler.verify.verify` has proven safe to run.

    Holding one means: every pass stands once, order is respected, every send meets its receive in
    the same order on both ends, no wait is cyclic, and memory stays under capacity:
    `peak_memory_bytes` is the most activation bytes that each rank holds at any time.
    """

    __slots__ = ("fingerprint", "peak_memory_bytes", "plan")

    def __init__(self, plan: Plan, fingerprint: str, peak_memory_bytes: tuple[int, ...]) -> None:
        """For `compiler.verify.verify` only; tests hold the rest of the code to that."""
        self.plan = plan
        self.fingerprint = fingerprint
        self.peak_memory_bytes = peak_memory_bytes
