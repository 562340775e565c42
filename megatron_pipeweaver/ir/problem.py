"""What is to be scheduled, and the one rule that says who waits for whom.

A *pass* is one sub-microbatch going through one modality module: ``pipeline_size * segments``
stages, stage ``s`` on rank ``s mod pipeline_size``. Times are integer nanoseconds, memory is
integer bytes. The file format is ``pipeweaver.problem/1`` (``docs/formats.md``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, NoReturn

from megatron_pipeweaver.errors import ConfigError


class OpKind(StrEnum):
    """What a rank does with a stage; the value is the printed form."""

    F = "F"
    """Forward."""
    B = "B"
    """Backward: the input gradient, and the weight gradient too unless a ``W`` follows."""
    W = "W"
    """Weight gradient, where it is split off."""


class PassKey(NamedTuple):
    """Identity of a pass within an iteration."""

    microbatch: int
    module: str
    sub_microbatch: int


class OpKey(NamedTuple):
    """Identity of an op: what is done (`kind`) to which stage of which pass."""

    kind: OpKind
    microbatch: int
    module: str
    sub_microbatch: int
    stage: int

    @property
    def owner(self) -> PassKey:
        """The pass this op belongs to."""
        return PassKey(self.microbatch, self.module, self.sub_microbatch)

    def with_kind(self, kind: OpKind) -> OpKey:
        """The op of another kind on the same stage of the same pass."""
        return self._replace(kind=kind)


class Dependency(NamedTuple):
    """`op` must end `latency_ns` before the waiting op starts.

    `carries_data` tells an activation or a gradient that moves between two stages from an order
    that holds within one stage (its backward after its forward, its ``W`` after its ``B``).
    """

    op: OpKey
    latency_ns: int
    carries_data: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to run a stage pair (forward and backward): its times and the memory it holds."""

    name: str
    forward_ns: int
    backward_ns: int
    weight_grad_ns: int
    memory_bytes: int

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("strategy: the name is empty; give every strategy a name")
        for what in ("forward_ns", "backward_ns", "weight_grad_ns", "memory_bytes"):
            value = getattr(self, what)
            if value < 0:
                raise ConfigError(f"strategy {self.name!r}: {what} is {value}; it must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassNode:
    """A pass without its costs: all that the dependency rule needs to know of it."""

    key: PassKey
    stages: int
    after: tuple[PassKey, ...]
    frozen: bool
    p2p_latency_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One sub-microbatch going through one module.

    `stages[s]` are the candidate strategies of stage pair ``s``; `after` names the passes of the
    same microbatch, as ``(module, sub_microbatch)``, whose outputs this pass consumes.
    """

    module: str
    sub_microbatch: int
    after: tuple[tuple[str, int], ...] = ()
    p2p_latency_ns: int = 0
    stages: tuple[tuple[Strategy, ...], ...]
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.sub_microbatch < 0:
            self._fail(": the sub-microbatch index must be >= 0")
        if self.p2p_latency_ns < 0:
            self._fail(f": p2p_latency_ns is {self.p2p_latency_ns}; it must be >= 0")
        for stage, strategies in enumerate(self.stages):
            if not strategies:
                self._fail(f", stage {stage}: no strategy; give at least one")
            names = [strategy.name for strategy in strategies]
            if len(set(names)) != len(names):
                self._fail(f", stage {stage}: strategy names repeat: {names}")

    def _fail(self, problem: str) -> NoReturn:
        raise ConfigError(f"pass {self.module!r} sub-microbatch {self.sub_microbatch}{problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The passes of one microbatch; every pass stands behind those it waits for, or before."""

    passes: tuple[Pass, ...]


class PassGraph:
    """Passes and how they hang together: the structure that `dependencies` reads.

    Args:
        pipeline_size: number of pipeline ranks.
        nodes: every pass of the iteration.

    Raises:
        ConfigError: a pass stands twice, waits for one that is not there, or for itself in a ring.
    """

    __slots__ = ("consumers", "nodes", "pipeline_size")

    def __init__(self, pipeline_size: int, nodes: Iterable[PassNode]) -> None:
        self.pipeline_size = pipeline_size
        self.nodes: dict[PassKey, PassNode] = {}
        for node in nodes:
            if node.key in self.nodes:
                raise ConfigError(f"{_pass_name(node.key)} stands twice; name each pass once")
            self.nodes[node.key] = node
        self.consumers: dict[PassKey, list[PassKey]] = {key: [] for key in self.nodes}
        for node in self.nodes.values():
            for producer in node.after:
                if producer not in self.nodes:
                    raise ConfigError(
                        f"{_pass_name(node.key)} comes after {_pass_name(producer)}, which is not "
                        "there; `after` names passes of the same microbatch"
                    )
                self.consumers[producer].append(node.key)
        self._refuse_rings()

    def _refuse_rings(self) -> None:
        waiting = {key: len(node.after) for key, node in self.nodes.items()}
        ready = [key for key, count in waiting.items() if count == 0]
        done = 0
        while ready:
            done += 1
            for consumer in self.consumers[ready.pop()]:
                waiting[consumer] -= 1
                if waiting[consumer] == 0:
                    ready.append(consumer)
        if done != len(self.nodes):
            ring = next(key for key, count in waiting.items() if count)
            raise ConfigError(f"{_pass_name(ring)} waits for itself through `after`; cut the ring")

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds `stage`."""
        return stage % self.pipeline_size

    def ops(self, *, split: bool = False) -> Iterator[OpKey]:
        """Every op of the iteration: forwards, and backwards of what is not frozen.

        Args:
            split: also the weight-gradient op of every stage that has a backward.
        """
        for key, node in self.nodes.items():
            for stage in range(node.stages):
                yield OpKey(OpKind.F, *key, stage)
                if not node.frozen:
                    yield OpKey(OpKind.B, *key, stage)
                    if split:
                        yield OpKey(OpKind.W, *key, stage)


def dependencies(graph: PassGraph, op: OpKey) -> tuple[Dependency, ...]:
    """Who `op` waits for: THE dependency rule, which every part of PipeWeaver reads.

    - The forward of stage s waits for the forward of stage s-1; of stage 0, for the forward of the
      last stage of every pass in `after`.
    - The backward of stage s waits for its own forward and for the backward of stage s+1; of the
      last stage, for the backward of stage 0 of every pass that consumes it and is not frozen.
    - The weight gradient of a stage waits for the backward of that stage.

    Between ranks the latency of the pass counts; between two passes, in both directions, that of
    the pass that comes first in the forward direction; on one rank there is none.

    Returns:
        The dependencies of `op`; latencies in nanoseconds.
    """
    node = graph.nodes[op.owner]
    latency = node.p2p_latency_ns if graph.pipeline_size > 1 else 0
    if op.kind is OpKind.W:
        return (Dependency(op.with_kind(OpKind.B), 0, False),)
    if op.kind is OpKind.F:
        if op.stage > 0:
            return (Dependency(op._replace(stage=op.stage - 1), latency, True),)
        return tuple(
            Dependency(
                OpKey(OpKind.F, *producer, graph.nodes[producer].stages - 1),
                _latency_between(graph, producer),
                True,
            )
            for producer in node.after
        )
    own_forward = Dependency(op.with_kind(OpKind.F), 0, False)
    if op.stage < node.stages - 1:
        return own_forward, Dependency(op._replace(stage=op.stage + 1), latency, True)
    return own_forward, *(
        Dependency(OpKey(OpKind.B, *consumer, 0), _latency_between(graph, op.owner), True)
        for consumer in graph.consumers[op.owner]
        if not graph.nodes[consumer].frozen
    )


def receivers(graph: PassGraph, op: OpKey) -> tuple[OpKey, ...]:
    """Who needs the tensor that `op` makes: the rule of `dependencies`, read the other way."""
    node = graph.nodes[op.owner]
    if op.kind is OpKind.W:
        return ()
    if op.kind is OpKind.F:
        if op.stage < node.stages - 1:
            return (op._replace(stage=op.stage + 1),)
        return tuple(OpKey(OpKind.F, *consumer, 0) for consumer in graph.consumers[op.owner])
    if op.stage > 0:
        return (op._replace(stage=op.stage - 1),)
    return tuple(
        OpKey(OpKind.B, *producer, graph.nodes[producer].stages - 1)
        for producer in node.after
        if not graph.nodes[producer].frozen
    )


def _latency_between(graph: PassGraph, producer: PassKey) -> int:
    """Latency from the last stage of `producer` to stage 0 of a consumer, which is on rank 0."""
    node = graph.nodes[producer]
    return node.p2p_latency_ns if graph.rank_of(node.stages - 1) != 0 else 0


def _pass_name(key: PassKey) -> str:
    return f"microbatch {key.microbatch}, pass {key.module!r} sub-microbatch {key.sub_microbatch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One iteration's scheduling problem for one pipeline (`pipeweaver.problem/1`).

    `modules` maps a module's name to its number of pipeline segments, in forward order;
    `memory_capacity_bytes[r]` is what rank r has for activations.
    """

    pipeline_size: int
    memory_capacity_bytes: tuple[int, ...]
    modules: Mapping[str, int]
    microbatches: tuple[Microbatch, ...]
    graph: PassGraph = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.pipeline_size < 1:
            raise ConfigError(f"pipeline_size is {self.pipeline_size}; it must be >= 1")
        if len(self.memory_capacity_bytes) != self.pipeline_size:
            raise ConfigError(
                f"memory_capacity_bytes has {len(self.memory_capacity_bytes)} entries for "
                f"{self.pipeline_size} ranks; give one per rank"
            )
        if any(capacity < 0 for capacity in self.memory_capacity_bytes):
            raise ConfigError("memory_capacity_bytes holds a negative number; bytes are >= 0")
        for name, segments in self.modules.items():
            if not name or segments < 1:
                raise ConfigError(f"module {name!r} has {segments} segments; it needs at least 1")
        for index, microbatch in enumerate(self.microbatches):
            for one in microbatch.passes:
                self._check_pass(index, one)
        object.__setattr__(self, "graph", PassGraph(self.pipeline_size, self._nodes()))

    def _check_pass(self, index: int, one: Pass) -> None:
        segments = self.modules.get(one.module)
        if segments is None:
            where = _pass_name(PassKey(index, one.module, one.sub_microbatch))
            raise ConfigError(f"{where}: no such module; `modules` has {list(self.modules)}")
        expected = self.pipeline_size * segments
        if len(one.stages) != expected:
            where = _pass_name(PassKey(index, one.module, one.sub_microbatch))
            raise ConfigError(
                f"{where} has {len(one.stages)} stages; {self.pipeline_size} ranks x "
                f"{self.modules[one.module]} segments make {expected}"
            )

    def _nodes(self) -> Iterator[PassNode]:
        for index, microbatch in enumerate(self.microbatches):
            for one in microbatch.passes:
                yield PassNode(
                    key=PassKey(index, one.module, one.sub_microbatch),
                    stages=len(one.stages),
                    after=tuple(PassKey(index, *name) for name in one.after),
                    frozen=one.frozen,
                    p2p_latency_ns=one.p2p_latency_ns,
                )

    def passes(self) -> Iterator[tuple[PassKey, Pass]]:
        """Every pass with its key, by microbatch, in file order."""
        for index, microbatch in enumerate(self.microbatches):
            for one in microbatch.passes:
                yield PassKey(index, one.module, one.sub_microbatch), one

    def strategy(self, op: OpKey, name: str) -> Strategy:
        """The strategy `name` of `op`'s stage pair.

        Raises:
            KeyError: the pass, the stage or the strategy is not in the problem.
        """
        if op.owner in self.graph.nodes and 0 <= op.stage < self.graph.nodes[op.owner].stages:
            for one in self.microbatches[op.microbatch].passes:
                if (one.module, one.sub_microbatch) == (op.module, op.sub_microbatch):
                    for strategy in one.stages[op.stage]:
                        if strategy.name == name:
                            return strategy
        raise KeyError((op, name))
