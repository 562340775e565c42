"""Profile-guided costs: measured stage times correct what the cost model predicts.

A *class* is a module, the role of the stage in it (the first one embeds, the last one projects or
makes the loss), the kind of op, and the power of two that the pass's tokens reach. For each class
the latest ratios of measured to predicted time are kept; their median is the correction, drawn
towards that of wider classes (the module's kind of op, then everything) as long as they are few:

    correction = wider ** (n0 / (n + n0)) * median ** (n / (n + n0))

So a size that was never seen is corrected like its module, and relative costs, which are what a
schedule follows, stay in proportion. The same measurements give the same corrections.

A backward whose weight gradients run apart is another kind of op (``S``) than one in one piece
(``B``), which takes what both take. Each has corrections of its own, so what a split costs beyond
its parts is what S and W were measured to take against B:

    B as measured   | input and weight gradients |
    S, W as measured| input gradients | | weight gradients + overhead |
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.problem import OpKind, PassKey, Problem, Strategy
from megatron_pipeweaver.ir.trace import TraceKind, TraceRow
from megatron_pipeweaver.partition.workload import loads
from megatron_pipeweaver.semu.interface import CostModel, Load, StageShape

UNCHANGED_PERMILLE = 1000
WIDEST = 64
"""No class is corrected by more than this factor, either way."""
SPLIT_BACKWARD = "S"
"""The kind of a backward that leaves weight gradients to an op of their own."""
FEW = 4
"""At this many samples (n0) a class counts as much as the wider one."""
KEPT = 64
"""Samples of a class that are kept; the oldest go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One op as it ran: how long, and under which strategy."""

    kind: OpKind
    microbatch: int
    module: str
    sub_microbatch: int
    stage: int
    strategy: str
    duration_ns: int


@dataclass(frozen=True, slots=True, order=True)
class CostClass:
    """What is corrected alike; `size` is the bit length of the pass's tokens, 0 for any.

    An empty `module`, `role` or `kind` stands for all of them.
    """

    module: str
    role: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionRow:
    """The correction of one class, in thousandths."""

    module: str
    role: str
    kind: str
    size: int
    permille: int

    def __post_init__(self) -> None:
        low, high = UNCHANGED_PERMILLE // WIDEST, UNCHANGED_PERMILLE * WIDEST
        if not low <= self.permille <= high:
            raise ConfigError(f"correction: {self.permille} permille; need {low} to {high}")


class Corrections:
    """Factors by class; a class without one takes that of the next wider class, at last 1.

    What never ran apart is corrected like the backward that it was part of, and the other way
    round.
    """

    def __init__(self, rows: Iterable[CorrectionRow] = ()) -> None:
        self.rows = tuple(rows)
        self._permille = {
            CostClass(one.module, one.role, one.kind, one.size): one.permille for one in self.rows
        }

    def permille(self, one: CostClass) -> int:
        """The factor of `one` in thousandths."""
        chain = [one, *widened(one)]
        if one.kind in _UNKNOWN_LIKE:
            other = replace(one, kind=_UNKNOWN_LIKE[one.kind])
            chain[-1:] = [other, *widened(other)]
        for wider in chain:
            if wider in self._permille:
                return self._permille[wider]
        return UNCHANGED_PERMILLE

    def logs(self) -> dict[CostClass, float]:
        """The logarithms of the factors."""
        return {
            one: math.log(permille / UNCHANGED_PERMILLE) for one, permille in self._permille.items()
        }

    def coarse(self) -> list[list[str | int]]:
        """The factors in steps of a quarter: small changes leave it as it is."""
        return [
            [one.module, one.role, one.kind, one.size, _step(one.permille)] for one in self.rows
        ]

    def apply(
        self,
        module: ModuleSpec,
        stage: StageShape,
        load: Load,
        strategy: Strategy,
        *,
        overhead_permille: int | None = None,
    ) -> Strategy:
        """`strategy` with corrected times.

        Args:
            module: whose layers run.
            stage: which of them.
            load: on what.
            strategy: as emulated.
            overhead_permille: for backwards whose weight gradients run apart, what that takes
                until it was measured, in thousandths of the whole backward; `None` for backwards
                in one piece.
        """
        here = CostClass(module.name, role_of(stage), OpKind.F.value, size_of(load))
        whole = replace(here, kind=OpKind.B.value)
        backward = whole if overhead_permille is None else replace(here, kind=SPLIT_BACKWARD)
        weight = whole if overhead_permille is None else replace(here, kind=OpKind.W.value)
        backward_ns = _scaled(strategy.backward_ns, self.permille(backward))
        weight_grad_ns = _scaled(strategy.weight_grad_ns, self.permille(weight))
        if weight_grad_ns and overhead_permille and not self._measured(weight):
            weight_grad_ns += _scaled(backward_ns + weight_grad_ns, overhead_permille)
        return replace(
            strategy,
            forward_ns=_scaled(strategy.forward_ns, self.permille(here)),
            backward_ns=backward_ns,
            weight_grad_ns=weight_grad_ns,
        )

    def _measured(self, one: CostClass) -> bool:
        """Whether `one`, or its module's kind of op, was measured."""
        return any(each in self._permille for each in (one, *widened(one)[:-1]))


class CorrectedCosts:
    """A `CostModel` with times as measured so far.

    Args:
        costs: the model that is corrected; its memory and its messages stay as they are.
        corrections: what was measured.
        overhead_permille: as in `Corrections.apply`.
    """

    def __init__(
        self,
        costs: CostModel,
        corrections: Corrections | None = None,
        *,
        overhead_permille: int | None = None,
    ) -> None:
        self.costs = costs
        self.corrections = Corrections() if corrections is None else corrections
        self._overhead_permille = overhead_permille

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        """As the model's, in corrected time."""
        strategies = self.costs.stage_strategies(module, stage, load)
        overhead = self._overhead_permille
        return tuple(
            self.corrections.apply(module, stage, load, one, overhead_permille=overhead)
            for one in strategies
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """As the model's."""
        return self.costs.p2p_latency_ns(size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One op's time as predicted without corrections, and as measured."""

    cost_class: CostClass
    predicted_ns: int
    measured_ns: int


class Feedback:
    """Collects samples and makes corrections of them.

    Args:
        before: what was known without the samples, and is drawn towards while they are few.
    """

    def __init__(self, before: Corrections | None = None) -> None:
        self._before = {} if before is None else before.logs()
        self._ratios: dict[CostClass, deque[float]] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Take `samples` in; those that nothing can be learnt from are left out."""
        for one in samples:
            if one.predicted_ns < 1 or one.measured_ns < 1:
                continue
            ratio = math.log(one.measured_ns / one.predicted_ns)
            for wider in (one.cost_class, *widened(one.cost_class)):
                kept = self._ratios.setdefault(wider, deque(maxlen=KEPT))
                kept.append(ratio)

    def corrections(self) -> Corrections:
        """What the samples so far come to."""
        logs = {**self._before, **{one: self._log(one) for one in self._ratios}}
        return Corrections(
            CorrectionRow(
                module=one.module,
                role=one.role,
                kind=one.kind,
                size=one.size,
                permille=round(UNCHANGED_PERMILLE * math.exp(log)),
            )
            for one, log in sorted(logs.items())
        )

    def _log(self, one: CostClass) -> float:
        """The logarithm of the correction, drawn towards that of wider classes."""
        found = 0.0
        for wider in (*reversed(widened(one)), one):
            ratios = self._ratios[wider]
            found = self._before.get(wider, found)
            share = len(ratios) / (len(ratios) + FEW)
            found += share * (median(ratios) - found)
        limit = math.log(WIDEST) - 1e-3
        return min(max(found, -limit), limit)


_UNKNOWN_LIKE: Mapping[str, str] = {
    OpKind.W.value: OpKind.B.value,
    SPLIT_BACKWARD: OpKind.B.value,
    OpKind.B.value: SPLIT_BACKWARD,
}
"""A kind of op that was never measured takes the corrections of another one."""


def widened(one: CostClass) -> tuple[CostClass, ...]:
    """The classes that `one` lies in, narrowest first."""
    chain = (
        replace(one, size=0),
        replace(one, size=0, role=""),
        CostClass("", "", "", 0),
    )
    return tuple(wider for wider in chain if wider != one)


def role_of(stage: StageShape) -> str:
    """What a stage has besides layers."""
    roles = {(True, True): "only", (True, False): "first", (False, True): "last"}
    return roles.get((stage.is_first, stage.is_last), "inner")


def size_of(load: Load) -> int:
    """The power of two that the tokens of `load` reach, as a bit length."""
    return load.tokens.bit_length()


def stage_times(rows: Iterable[TraceRow]) -> tuple[StageTime, ...]:
    """The ops among `rows`, which may be of any ranks."""
    return tuple(
        StageTime(
            kind=row.key.kind,
            microbatch=row.key.microbatch,
            module=row.key.module,
            sub_microbatch=row.key.sub_microbatch,
            stage=row.key.stage,
            strategy=row.strategy,
            duration_ns=row.end_ns - row.start_ns,
        )
        for row in rows
        if row.kind is TraceKind.COMPUTE
    )


def samples_of(
    times: Iterable[StageTime],
    batch: BatchMetadata,
    problem: Problem,
    model: ModelSpec,
    layout: ChunkLayout,
    sub_microbatch: Mapping[str, int],
) -> tuple[Sample, ...]:
    """Measured ops beside their prediction in `problem`, which was made of `batch`.

    An op that the problem does not know is left out.
    """
    times = tuple(times)
    passes = dict(problem.passes())
    sizes = {
        key: size_of(load)
        for key, (_, load) in zip(passes, loads(batch, model, sub_microbatch), strict=True)
    }
    stages = {one.module: len(one.layers) for one in layout.modules}
    split = {_stage_key(one) for one in times if one.kind is OpKind.W}
    samples = []
    for one in times:
        key = PassKey(one.microbatch, one.module, one.sub_microbatch)
        if key not in passes or not one.stage < stages[one.module]:
            continue
        found = {each.name: each for each in passes[key].stages[one.stage]}.get(one.strategy)
        if found is None:
            continue
        shape = StageShape(
            layers=0, is_first=one.stage == 0, is_last=one.stage == stages[one.module] - 1
        )
        apart = _stage_key(one) in split
        kind = SPLIT_BACKWARD if apart and one.kind is OpKind.B else one.kind.value
        samples.append(
            Sample(
                cost_class=CostClass(one.module, role_of(shape), kind, sizes[key]),
                predicted_ns=_predicted_ns(found, one.kind, apart),
                measured_ns=one.duration_ns,
            )
        )
    return tuple(samples)


def median_error_permille(samples: Iterable[Sample], corrections: Corrections) -> int:
    """How far corrected predictions are from measured times, relative to these: the median."""
    errors = [
        abs(_scaled(one.predicted_ns, corrections.permille(one.cost_class)) - one.measured_ns)
        * UNCHANGED_PERMILLE
        // one.measured_ns
        for one in samples
        if one.measured_ns > 0
    ]
    return round(median(errors)) if errors else 0


def _stage_key(one: StageTime) -> tuple[int, str, int, int]:
    return one.microbatch, one.module, one.sub_microbatch, one.stage


def _predicted_ns(strategy: Strategy, kind: OpKind, split: bool) -> int:
    whole = 0 if split else strategy.weight_grad_ns
    return {
        OpKind.F: strategy.forward_ns,
        OpKind.B: strategy.backward_ns + whole,
        OpKind.W: strategy.weight_grad_ns,
    }[kind]


def _step(permille: int) -> int:
    return round(math.log(permille / UNCHANGED_PERMILLE) / math.log(1.25))


def _scaled(time_ns: int, permille: int) -> int:
    return (time_ns * permille + UNCHANGED_PERMILLE // 2) // UNCHANGED_PERMILLE
