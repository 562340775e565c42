"""Plans read by the native core: what is verified there is what is looked at here.

A plan's bytes are read and proven in a few milliseconds, without Python's lock. Its rows become
Python's objects where someone looks at them: a rank looks at its own actions and their messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, overload

from megatron_pipeweaver._core import PackedPlan as Core
from megatron_pipeweaver.ir.codec import digest
from megatron_pipeweaver.ir.plan import (
    Action,
    ActionKind,
    ComputeAction,
    Message,
    PassPayload,
    Plan,
    PlanPass,
    TransferAction,
)
from megatron_pipeweaver.ir.plan_codec import plan_from_json
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey

_T = TypeVar("_T")
_KINDS = tuple(ActionKind)
_OPS = tuple(OpKind)


class Rows(Sequence[_T]):
    """A tuple whose items are made when they are first looked at.

    Args:
        make: makes the item at an index from 0.
        count: how many there are.
    """

    __slots__ = ("_count", "_made", "_make")

    def __init__(self, make: Callable[[int], _T], count: int) -> None:
        self._make = make
        self._count = count
        self._made: dict[int, _T] = {}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        made = self._made.get(index) if type(index) is int else None
        if made is not None:
            return made
        if isinstance(index, slice):
            return tuple(self[one] for one in range(*index.indices(self._count)))
        number = range(self._count)[index]
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]

    def __iter__(self) -> Iterator[_T]:
        return (self[index] for index in range(self._count))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(_equal, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def _equal(one: object, other: object) -> bool:
    return one == other


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """A plan in its canonical bytes, read by the native core.

    `plan` is the same plan for Python, `fingerprint` that of `ir.plan_codec`.
    """

    data: bytes
    core: Core
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the plan's bytes."""
        return digest(self.data)

    def peak_memory_bytes(self) -> tuple[int, ...] | None:
        """Per rank, the most bytes that are held; `None` unless the core has proven the plan."""
        peaks = self.core.peaks()
        return None if peaks is None else tuple(peaks)

    @cached_property
    def plan(self) -> Plan:
        """The plan, its actions and messages made when they are looked at."""
        core = self.core
        passes = _passes(core)
        keys = [one.key for one in passes]

        def op(row: tuple[int, int, int]) -> OpKey:
            return OpKey(_OPS[row[0]], *keys[row[1]], row[2])

        def actions(rank: int) -> Sequence[Action]:
            return tuple(_action(row, op) for row in core.actions(rank))

        def message(index: int) -> Message:
            source, target, source_rank, target_rank, sequence, shape, dtype = core.message(index)
            return Message(
                source=op(source),
                target=op(target),
                source_rank=source_rank,
                target_rank=target_rank,
                sequence=sequence,
                shape=shape,
                dtype=dtype,
            )

        return Plan(
            pipeline_size=len(core.capacity),
            modules=dict(zip(core.modules, core.segments, strict=True)),
            forward_only=core.forward_only,
            memory_capacity_bytes=tuple(core.capacity),
            makespan_ns=core.makespan,
            passes=passes,
            messages=Rows(message, core.message_count),
            ranks=Rows(actions, len(core.capacity)),
        )


def read_plan(data: bytes, source: str = "plan") -> Plan | PackedPlan:
    """The plan in `data`, for `verify`; by the native core where it is canonical.

    Raises:
        ConfigError: the bytes are not a valid `pipeweaver.plan/1`.
    """
    core = Core.read(data)
    if core is None:
        return plan_from_json(data, source)
    return PackedPlan(data=data, core=core, source=source)


def _passes(core: Core) -> tuple[PlanPass, ...]:
    rows = core.passes()
    keys = [PassKey(microbatch, module, sub) for microbatch, module, sub, *_ in rows]
    return tuple(
        PlanPass(
            key=key,
            stages=stages,
            after=tuple(keys[one] for one in after),
            frozen=frozen,
            payload=PassPayload(
                item_start=start, item_stop=stop, hidden_shape=hidden, output_shape=output
            ),
        )
        for key, (_, _, _, stages, after, frozen, start, stop, hidden, output) in zip(
            keys, rows, strict=True
        )
    )


def _action(row: Any, op: Callable[[tuple[int, int, int]], OpKey]) -> Action:
    if len(row) == 2:
        kind, messages = row
        return TransferAction(kind=_KINDS[kind], messages=messages)
    kind, key, strategy, memory_bytes = row
    return ComputeAction(
        kind=_KINDS[kind], op=op(key), strategy=strategy, memory_bytes=memory_bytes
    )
