"""The native core's stage interleaving in plain Python: slow, short, the oracle of the tests.

`decode` does what `_core.Core.decode` does, op for op: the same choices, the same ties, the same
times. What the rules are and why they cannot deadlock stands in `interleave.py`. Microbatches that
fit alone only in certain orders of their passes are left to the core (`Unsupported`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_pipeweaver._core import Policy
from megatron_pipeweaver.ir.problem import OpKey, OpKind, Problem, Strategy, dependencies

KINDS = (OpKind.F, OpKind.B, OpKind.W)


class Unsupported(Exception):  # noqa: N818 - a skip, not an error
    """A microbatch fits alone only in certain orders of its passes."""


class Choice(NamedTuple):
    """What a rank would do next; compared by start, key, stage pair."""

    start_ns: int
    key: int
    pair: int
    op: OpKey
    level: int


@dataclass(slots=True)
class Decoded:
    """Ops in execution order per rank, their times by op, and the level of every stage pair."""

    order: list[list[OpKey]]
    start_ns: dict[OpKey, int] = field(default_factory=dict)
    end_ns: dict[OpKey, int] = field(default_factory=dict)
    level: dict[int, int] = field(default_factory=dict)


def levels_of(strategies: tuple[Strategy, ...], frozen: bool) -> list[Strategy]:
    """The strategies, leanest first, without those that another one beats in time and memory."""

    def time_ns(one: Strategy) -> int:
        backward = 0 if frozen else one.backward_ns + one.weight_grad_ns
        return one.forward_ns + backward

    kept: list[Strategy] = []
    for one in sorted(strategies, key=lambda s: (s.memory_bytes, time_ns(s))):
        if not kept or time_ns(one) < time_ns(kept[-1]):
            kept.append(one)
    return kept


class _Decoder:
    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem, self.graph, self.policy = problem, problem.graph, policy
        self.ranks = range(problem.pipeline_size)
        self.pair: dict[tuple[int, str, int, int], int] = {}
        self.levels: list[list[Strategy]] = []
        for key, one in problem.passes():
            for stage, strategies in enumerate(one.stages):
                self.pair[(*key, stage)] = len(self.levels)
                self.levels.append(levels_of(strategies, one.frozen))
        self.ops = list(self.graph.ops(split=policy.split))
        self.waits = {
            op: {d.op: d.latency_ns for d in dependencies(self.graph, op)} for op in self.ops
        }
        self.left = set(self.ops)
        self.out = Decoded(order=[[] for _ in self.ranks])
        self.free = [0 for _ in self.ranks]
        self.held = [dict[int, int]() for _ in self.ranks]
        self.need = self._alone()
        self.flight: list[int] = []
        self.relaxed: set[int] = set()
        self.last_kind: list[OpKind | None] = [None for _ in self.ranks]
        self.backwards: list[OpKey] = []

    def pair_of(self, op: OpKey) -> int:
        return self.pair[(*op.owner, op.stage)]

    def key_of(self, op: OpKey) -> int:
        return self.policy.key[3 * self.pair_of(op) + KINDS.index(op.kind)]

    def rank_of(self, op: OpKey) -> int:
        return self.graph.rank_of(op.stage)

    def frozen(self, op: OpKey) -> bool:
        return self.graph.nodes[op.owner].frozen

    def enters(self, op: OpKey) -> bool:
        first = op.kind is OpKind.F and op.stage == 0
        return first and not self.graph.nodes[op.owner].after

    def _alone(self) -> list[list[int]]:
        """Per rank and microbatch, what it needs alone at its leanest levels."""
        need = [[0] * len(self.problem.microbatches) for _ in self.ranks]
        transient = [[0] * len(self.problem.microbatches) for _ in self.ranks]
        for (microbatch, _, _, stage), pair in self.pair.items():
            pass_key = next(key for key in self.graph.nodes if self.pair.get((*key, stage)) == pair)
            rank, lean = self.graph.rank_of(stage), self.levels[pair][0].memory_bytes
            if self.graph.nodes[pass_key].frozen:
                transient[rank][microbatch] = max(transient[rank][microbatch], lean)
            else:
                need[rank][microbatch] += lean
        for rank in self.ranks:
            for microbatch, more in enumerate(transient[rank]):
                need[rank][microbatch] += more
                if need[rank][microbatch] > self.problem.memory_capacity_bytes[rank]:
                    raise Unsupported
        return need

    def safe(self, rank: int, microbatch: int, bytes_: int, lean: int) -> bool:
        """All in flight can still finish, oldest first, if `microbatch` holds `bytes_` more."""
        order = self.flight if microbatch in self.flight else [*self.flight, microbatch]
        capacity = self.problem.memory_capacity_bytes[rank]
        for index in range(order.index(microbatch) + 1):
            behind = sum(self.held[rank].get(k, 0) for k in order[index:]) + bytes_
            need = self.need[rank][order[index]] - (lean if order[index] == microbatch else 0)
            if behind + need > capacity:
                return False
        return sum(self.held[rank].values()) + bytes_ <= capacity

    def admit(self, op: OpKey) -> int | None:
        """The level at which this forward may start now."""
        pair, rank = self.pair_of(op), self.rank_of(op)
        levels = self.levels[pair]
        lower = op.microbatch in self.relaxed or (self.policy.adaptive and not self.enters(op))
        for level in range(self.policy.level[pair], -1, -1):
            bytes_ = levels[level].memory_bytes
            if self.frozen(op):
                total = sum(self.held[rank].values()) + bytes_
                fits = total <= self.problem.memory_capacity_bytes[rank]
            else:
                fits = self.safe(rank, op.microbatch, bytes_, levels[0].memory_bytes)
            if fits:
                return level
            if not lower:
                return None
        return None

    def in_turn(self, op: OpKey) -> bool:
        """In deterministic mode a backward waits for those before it in the order."""
        if not self.policy.in_order:
            return True
        place = (op.microbatch, op.sub_microbatch)
        return not any(
            other.kind is OpKind.B
            and (other.module, other.stage) == (op.module, op.stage)
            and (other.microbatch, other.sub_microbatch) < place
            for other in self.left
        )

    def ready(self, rank: int) -> list[OpKey]:
        """Ops of `rank` whose dependencies have run (they may still be on their way)."""
        return [
            op
            for op in self.left
            if self.rank_of(op) == rank and all(d not in self.left for d in self.waits[op])
        ]

    def arrival(self, op: OpKey) -> int:
        return max((self.out.end_ns[d] + lat for d, lat in self.waits[op].items()), default=0)

    def offer(self, op: OpKey) -> Choice | None:
        """`op` as a choice, if it may start."""
        rank = self.rank_of(op)
        level = 0
        start = max(self.arrival(op), self.free[rank])
        if op.kind is OpKind.F:
            admitted = self.admit(op)
            if admitted is None:
                return None
            level = admitted
        elif op.kind is OpKind.B and not self.in_turn(op):
            return None
        if self.enters(op):
            start = max(self.free[rank], self.policy.release[op.microbatch])
        return Choice(start, self.key_of(op), self.pair_of(op), op, level)

    def entering(self, waiting: list[OpKey]) -> Choice | None:
        """The next first forward: in the order of keys, those in flight past a blocked one."""

        def place(op: OpKey) -> tuple[int, int, int]:
            first = op.microbatch if self.policy.in_order else 0
            return first, self.key_of(op), self.pair_of(op)

        for index, op in enumerate(sorted((o for o in waiting if self.enters(o)), key=place)):
            started = op.microbatch in self.flight
            if index > 0 and not started:
                continue
            load = sum(self.policy.load[k] for k in [*self.flight, op.microbatch])
            if not started and self.flight and load > self.policy.load_limit:
                continue
            choice = self.offer(op)
            if choice is not None:
                return choice
        return None

    def choose(self, rank: int) -> Choice | None:
        """What `rank` would do next."""
        waiting = self.ready(rank)
        forwards, backwards = [
            [
                c
                for op in waiting
                if op.kind is kind and not self.enters(op) and (c := self.offer(op)) is not None
            ]
            for kind in (OpKind.F, OpKind.B)
        ]
        first = self.entering(waiting) if rank == 0 else None
        forward = min([*forwards, *([first] if first else [])], default=None)
        backward = min(backwards, default=None)
        choice = min((c for c in (forward, backward) if c is not None), default=None)
        weight = self.weight(rank, waiting, choice)
        if weight is not None:
            choice = weight
        elif (
            self.policy.alternate
            and forward is not None
            and backward is not None
            and forward.start_ns == backward.start_ns
        ):
            choice = forward if self.last_kind[rank] is OpKind.B else backward
        return self.held_back([*forwards, *backwards], choice)

    def weight(self, rank: int, waiting: list[OpKey], other: Choice | None) -> Choice | None:
        """The weight gradient that is due, if it goes before `other` or fits before it."""
        due = [op for op in waiting if op.kind is OpKind.W]
        if not due:
            return None
        if self.policy.in_order:
            op = min(due, key=lambda w: self.backwards.index(w.with_kind(OpKind.B)))
            key = self.backwards.index(op.with_kind(OpKind.B))
        else:
            op = min(due, key=lambda w: (self.key_of(w), self.pair_of(w)))
            key = self.key_of(op)
        pair, free = self.pair_of(op), self.free[rank]
        if other is not None and other.start_ns > free and self.policy.patience > 0:
            length = self.levels[pair][self.out.level[pair]].weight_grad_ns
            if (other.start_ns - free) * 256 < self.policy.patience * length:
                return None
        choice = Choice(free, key, pair, op, 0)
        return choice if other is None or choice[:3] < other[:3] else None

    def held_back(self, offers: list[Choice], best: Choice | None) -> Choice | None:
        """What arrives within the hold and has a lesser key goes before `best`."""
        if best is None or self.policy.hold == 0:
            return best
        soon = [
            c
            for c in offers
            if best.start_ns < c.start_ns <= best.start_ns + self.policy.hold and c.key < best.key
        ]
        return min(soon, key=lambda c: (c.key, c.start_ns, c.pair), default=best)

    def execute(self, rank: int, choice: Choice) -> None:
        op, pair = choice.op, choice.pair
        if op.kind is OpKind.F:
            self.out.level[pair] = choice.level
            if op.microbatch not in self.flight:
                self.flight.append(op.microbatch)
        strategy = self.levels[pair][self.out.level[pair]]
        length = {
            OpKind.F: strategy.forward_ns,
            OpKind.B: strategy.backward_ns + (0 if self.policy.split else strategy.weight_grad_ns),
            OpKind.W: strategy.weight_grad_ns,
        }[op.kind]
        self.out.order[rank].append(op)
        self.out.start_ns[op] = choice.start_ns
        self.out.end_ns[op] = self.free[rank] = choice.start_ns + length
        self.left.remove(op)
        held = self.held[rank]
        if op.kind is OpKind.F and not self.frozen(op):
            held[op.microbatch] = held.get(op.microbatch, 0) + strategy.memory_bytes
            self.need[rank][op.microbatch] -= self.levels[pair][0].memory_bytes
        if op.kind is (OpKind.W if self.policy.split else OpKind.B):
            held[op.microbatch] -= strategy.memory_bytes
        if op.kind is OpKind.B:
            self.backwards.append(op)
        if op.kind is not OpKind.W:
            self.last_kind[rank] = op.kind
        if not any(other.microbatch == op.microbatch for other in self.left):
            self.flight.remove(op.microbatch)

    def relax(self) -> None:
        """The oldest microbatch in flight that is not relaxed yet gives up its faster levels."""
        for microbatch in self.flight:
            if microbatch not in self.relaxed:
                self.relaxed.add(microbatch)
                return
        waiting = sorted(
            (op for op in self.ready(0) if self.enters(op)),
            key=lambda op: (
                op.microbatch if self.policy.in_order else 0,
                self.key_of(op),
                self.pair_of(op),
            ),
        )
        self.relaxed.add(waiting[0].microbatch)

    def run(self) -> Decoded:
        while self.left:
            choices = [
                (c.start_ns, rank, c) for rank in self.ranks if (c := self.choose(rank)) is not None
            ]
            if choices:
                _, rank, choice = min(choices, key=lambda item: item[:2])
                self.execute(rank, choice)
            else:
                self.relax()
        return self.out


def decode(problem: Problem, policy: Policy) -> Decoded:
    """What the core's `decode` gives for `problem` and `policy`.

    Raises:
        Unsupported: a microbatch fits alone only in certain orders of its passes.
    """
    return _Decoder(problem, policy).run()
