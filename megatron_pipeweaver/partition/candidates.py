"""Candidates of a stage pair: what each of its layers may do, as a knapsack (paper, section 4.3).

Of all ways to give every layer a strategy, up to S stay: the fastest, the leanest, and the fastest
in each of S - 2 even ranges of memory between them.

    time |x                        x  the fastest of a range
         |  . x                    .  neither slower nor larger than all others, but not kept
         |      . . x
         |            .  . x   x
         +-----|-----|-----|---- memory
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.reuse import Reuse
from megatron_pipeweaver.semu.stage_costs import GraphCost, StageCosts
from megatron_pipeweaver.semu.stages import canonical_stage

DEFAULT_CANDIDATES = 10
"""The paper's S."""
_PERMILLE = 1000
_STEPS = 8

_ORDER = (
    LayerStrategy.RECOMPUTE,
    LayerStrategy.MLP,
    LayerStrategy.UP_PROJECTION,
    LayerStrategy.SHARED_EXPERTS,
    LayerStrategy.LIGHT,
    LayerStrategy.ACTIVATION,
    LayerStrategy.ATTENTION,
    LayerStrategy.NORM,
    LayerStrategy.KEEP,
)
"""Strategies within a run of equal layers, behind those that go to the host.

A layer that is computed again takes longest, so a copy from the host hides best behind it.
"""


class LayeredCosts(Protocol):
    """A cost model that knows a stage's layers one by one; SEMU's `AnalyticCostModel` is one."""

    def layer_strategies(
        self,
        module: ModuleSpec,
        stage: StageShape,
        load: Load,
        strategies: Sequence[LayerStrategy] = ...,
    ) -> StageCosts:
        """Every layer's costs under each of `strategies`."""
        ...

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """Time of a message of `size_bytes` between neighbouring pipeline ranks."""
        ...


class PerLayerCosts:
    """A `CostModel` whose candidates choose a strategy for every layer.

    Args:
        costs: what each layer costs.
        strategies: what a layer may do.
        most: how many candidates a stage pair has at most (S).

    Raises:
        ConfigError: `most` is below two, or there is no strategy.
    """

    __slots__ = (
        "_costs",
        "_found",
        "_host_permille",
        "_leaner",
        "_most",
        "_stages",
        "_strategies",
    )

    def __init__(
        self,
        costs: LayeredCosts,
        strategies: Sequence[LayerStrategy],
        most: int = DEFAULT_CANDIDATES,
    ) -> None:
        if most < 2 or not strategies:
            raise ConfigError(
                f"candidates: {most} of {[one.value for one in strategies]}; need room for two, "
                "the fastest and the leanest, and at least one strategy"
            )
        self._costs = costs
        self._strategies = tuple(strategies)
        self._most = most
        self._found = Reuse()
        self._stages = Reuse()
        self._host_permille = _PERMILLE
        self._leaner: dict[int, PerLayerCosts] = {}

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        """The candidates of one stage pair, the fastest first, the leanest last."""
        stage = canonical_stage(module, stage)
        return self._found.get(
            (module, stage, load),
            lambda: stage_candidates(
                self._layers(module, stage, load), self._most, self._host_permille
            ),
        )

    def host_bytes(
        self, module: ModuleSpec, stage: StageShape, load: Load, strategy: str | None
    ) -> int:
        """Bytes that a stage pair keeps in its rank's host memory under the strategy so named.

        `None` stands for the most that any strategy keeps there.

        Raises:
            ConfigError: the stage has no such strategy.
        """
        stage = canonical_stage(module, stage)
        if strategy is None:
            name = LayerStrategy.OFFLOAD
            choice = (name if name in self._strategies else self._strategies[0],) * stage.layers
        else:
            choice = layer_strategies(strategy, stage.layers)
        if LayerStrategy.OFFLOAD not in choice:
            return 0
        return self._layers(module, stage, load).host_bytes(choice)

    def within(self, permille: int) -> PerLayerCosts:
        """The same, of candidates with so many thousandths at most of a stage pair on the host.

        It is one of a few such models, with thousandths rounded down to an eighth of the whole.
        """
        eighths = permille * _STEPS // _PERMILLE
        if eighths not in self._leaner:
            found = PerLayerCosts(self._costs, self._strategies, self._most)
            found._host_permille = eighths * _PERMILLE // _STEPS
            self._leaner[eighths] = found
        return self._leaner[eighths]

    def _layers(self, module: ModuleSpec, stage: StageShape, load: Load) -> StageCosts:
        return self._stages.get(
            (module, stage, load),
            lambda: self._costs.layer_strategies(module, stage, load, self._strategies),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        """Time of a message of `size_bytes` between neighbouring pipeline ranks."""
        return self._costs.p2p_latency_ns(size_bytes)


def stage_candidates(
    costs: StageCosts, most: int = DEFAULT_CANDIDATES, host_permille: int = _PERMILLE
) -> tuple[Strategy, ...]:
    """Up to `most` ways to run a stage pair, the fastest first, the leanest last.

    Without copies to the host, times and memory of layers add up and the candidates are exactly
    those of all choices. Copies hide behind other layers: they are timed exactly, for every number
    of layers from the first on that go to the host, beside the fronts of the other layers. Those
    with more than `host_permille` of the layers' bytes on the host are left out, as long as there
    are others.
    """
    choices = list(_choices(costs))
    if host_permille < _PERMILLE:
        host_bytes = [costs.host_bytes(choice) for choice in choices]
        limit = max(min(host_bytes), max(host_bytes) * host_permille // _PERMILLE)
        choices = [one for one, host in zip(choices, host_bytes, strict=True) if host <= limit]
    return spread([costs.strategy(choice) for choice in choices], most)


def spread(strategies: Sequence[Strategy], most: int) -> tuple[Strategy, ...]:
    """Of `strategies` the fastest, the leanest and the fastest in each of ``most - 2`` ranges.

    Those to which another one is as good or better in time and memory are left out first.
    """
    front: list[Strategy] = []
    for one in sorted(strategies, key=lambda one: (one.memory_bytes, duration_ns(one))):
        if not front or duration_ns(one) < duration_ns(front[-1]):
            front.append(one)
    if len(front) <= most:
        return tuple(reversed(front))
    least, largest = front[0].memory_bytes, front[-1].memory_bytes
    kept = {}
    for one in front:  # slower and leaner ones first: the last of a range is its fastest
        kept[(one.memory_bytes - least) * (most - 2) // (largest - least + 1)] = one
    chosen = list(dict.fromkeys([front[-1], *reversed(kept.values()), front[0]]))
    return tuple(chosen)


def duration_ns(one: Strategy) -> int:
    """Forward and backward together."""
    return one.forward_ns + one.backward_ns + one.weight_grad_ns


class _Entry(NamedTuple):
    """What some layers do together; the order of fields is that of a front."""

    memory_bytes: int
    time_ns: int
    choice: tuple[LayerStrategy, ...]


def _choices(costs: StageCosts) -> Iterator[tuple[LayerStrategy, ...]]:
    """Every choice worth a look, by how many of the first layers go to the host."""
    runs = [part for part in costs.parts if part.is_layer]
    layers = sum(part.copies for part in runs)
    common = set(LayerStrategy).intersection(*(part.costs for part in runs))
    offloaded = range(layers + 1 if LayerStrategy.OFFLOAD in common else 1)
    for ahead in offloaded if common - {LayerStrategy.OFFLOAD} else (layers,):
        front = [_Entry(0, 0, (LayerStrategy.OFFLOAD,) * ahead)]
        for part in runs:
            stays = max(0, part.copies - ahead)
            ahead -= part.copies - stays
            if stays:
                front = _both(front, _ordered(_equal_layers(part.costs, stays)))
        yield from (one.choice for one in front)


def _equal_layers(costs: Mapping[LayerStrategy, GraphCost], layers: int) -> list[_Entry]:
    """The front of `layers` equal layers: halves of a choice that none beats are such choices."""
    if layers == 1:
        return _pruned(
            _Entry(cost.held_bytes, _time_ns(cost), (one,))
            for one, cost in costs.items()
            if one is not LayerStrategy.OFFLOAD
        )
    half = _equal_layers(costs, layers // 2)
    return _both(half, half if layers % 2 == 0 else _both(half, _equal_layers(costs, 1)))


def _both(first: Sequence[_Entry], second: Sequence[_Entry]) -> list[_Entry]:
    """The front of the layers of `first` and, behind them, those of `second`."""
    return _pruned(
        _Entry(a.memory_bytes + b.memory_bytes, a.time_ns + b.time_ns, a.choice + b.choice)
        for a in first
        for b in second
    )


def _pruned(entries: Iterable[_Entry]) -> list[_Entry]:
    """Those that no other one beats in both memory and time, the leanest first."""
    front: list[_Entry] = []
    for one in sorted(entries):
        if not front or one.time_ns < front[-1].time_ns:
            front.append(one)
    return front


def _ordered(front: Iterable[_Entry]) -> list[_Entry]:
    """Equal layers change places freely: strategies in one order."""
    return [one._replace(choice=tuple(sorted(one.choice, key=_ORDER.index))) for one in front]


def _time_ns(cost: GraphCost) -> int:
    return cost.forward_ns + cost.backward_ns + cost.weight_grad_ns
