"""The walk over cuts: against brute force, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.problem import Problem, Strategy
from megatron_pipeweaver.partition.balance import (
    Balance,
    Fixed,
    Outcome,
    Probe,
    Probes,
    Workbench,
    balance_layout,
    expected_batches,
)
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.semu.interface import Load, StageShape

LAYER_NS = 1_000
SIZES = {"hidden_size": 8, "ffn_hidden_size": 8, "attention_heads": 1, "kv_groups": 1}
IMAGE = Item(units=16, tokens=4)
POOL = tuple(
    MicrobatchMetadata(sequence_length=64, items={"vision": (IMAGE,) * count}) for count in range(4)
)
TEXT = (MicrobatchMetadata(sequence_length=64),)
MICROBATCHES = 16


class HeadCosts:
    """Every layer takes as long, and the language model's head as long as `head` layers."""

    def __init__(self, head: int = 0) -> None:
        self.head = head

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        head = self.head if stage.is_last and module.name == "language" else 0
        return (
            Strategy(
                name="keep",
                forward_ns=LAYER_NS * (stage.layers + head),
                backward_ns=0,
                weight_grad_ns=0,
                memory_bytes=1,
            ),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return 0


def language(layers: int, after: tuple[str, ...] = ()) -> ModuleSpec:
    return ModuleSpec(
        name="language", kind=ModuleKind.LANGUAGE, layers=layers, after=after, **SIZES
    )


def text_model(layers: int) -> ModelSpec:
    return ModelSpec(name="toy", modules=(language(layers),))


def image_model(vision: int = 8, layers: int = 12) -> ModelSpec:
    encoder = ModuleSpec(name="vision", kind=ModuleKind.VISION, layers=vision, **SIZES)
    return ModelSpec(name="toy", modules=(encoder, language(layers, after=("vision",))))


def busiest_rank(problem: Problem) -> Outcome:
    """A schedule without bubbles: as long as the busiest rank works."""
    busy = [0] * problem.pipeline_size
    for _, one in problem.passes():
        for stage, (strategy,) in enumerate(one.stages):
            busy[stage % problem.pipeline_size] += strategy.forward_ns
    return Outcome(makespan_ns=max(busy), busy_ns=tuple(busy))


def fewer_bubbles(problem: Problem) -> Outcome:
    """The more segments, the shorter: as if bubbles were all that counts."""
    found = busiest_rank(problem)
    segments = sum(problem.modules.values())
    return replace(found, makespan_ns=found.makespan_ns // segments)


def workbench(
    model: ModelSpec,
    costs: HeadCosts,
    capacity: Callable[[ChunkLayout], tuple[int, ...]] = lambda one: (9,) * one.pipeline_size,
) -> Workbench:
    sizes = {one.name: 2 for one in model.modules[:-1]}
    return Workbench(model=model, sub_microbatch=sizes, costs=costs, capacity_bytes=capacity)


def alike(probe: Probe) -> Probes:
    return Probes(walk=probe, verdict=probe)


def layers(layout: ChunkLayout) -> list[tuple[int, ...]]:
    return [one.layers for one in layout.modules]


def segments(found: Balance) -> list[int]:
    return [one.segments for one in found.layout.modules]


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every cut that leaves each stage a layer."""
    for inner in combinations(range(1, layers), stages - 1):
        yield tuple(after - before for before, after in pairwise((0, *inner, layers)))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("head", [0, 2, 5])
def test_no_cut_is_shorter_than_the_one_found(head: int, ranks: int) -> None:
    model = text_model(14)
    bench, start = workbench(model, HeadCosts(head)), make_layout(model, ranks, {})
    found = balance_layout(
        start,
        bench,
        TEXT,
        MICROBATCHES,
        alike(busiest_rank),
        Fixed(segments=frozenset({"language"})),
    )
    (batch,) = expected_batches(TEXT, MICROBATCHES, 1)

    def makespan_ns(cut: tuple[int, ...]) -> int:
        module = replace(start.modules[0], layers=cut)
        layout = replace(start, modules=(module,))
        return busiest_rank(bench.problem(layout, batch)).makespan_ns

    assert found.after_ns == min(map(makespan_ns, cuts(14, ranks)))


def test_layers_leave_the_rank_that_holds_the_head() -> None:
    model = image_model(layers=21)
    start = make_layout(model, 3, {})
    found = balance_layout(
        start, workbench(model, HeadCosts(head=3)), POOL, MICROBATCHES, alike(busiest_rank),
        Fixed(segments=frozenset({"vision", "language"})),
    )  # fmt: skip
    assert layers(start) == [(3, 3, 2), (7, 7, 7)]
    assert layers(found.layout)[1][-1] < 7
    assert [sum(one) for one in layers(found.layout)] == [8, 21]
    assert found.after_ns < found.before_ns
    assert found.gain == pytest.approx(1 - found.after_ns / found.before_ns)


def test_stages_are_never_left_empty() -> None:
    model = text_model(5)
    start = make_layout(model, 4, {})
    bench = workbench(model, HeadCosts(head=50))
    found = balance_layout(start, bench, TEXT, MICROBATCHES, alike(busiest_rank))
    assert min(layers(found.layout)[0]) == 1


def test_segments_are_added_up_to_what_the_layers_allow() -> None:
    model = image_model(vision=8, layers=12)
    bench, start = workbench(model, HeadCosts()), make_layout(model, 2, {})
    found = balance_layout(start, bench, POOL, MICROBATCHES, alike(fewer_bubbles))
    assert segments(found) == [4, 6]


def test_fixed_segments_stay() -> None:
    model = image_model()
    bench, start = workbench(model, HeadCosts()), make_layout(model, 2, {"language": 2})
    found = balance_layout(
        start,
        bench,
        POOL,
        MICROBATCHES,
        alike(fewer_bubbles),
        Fixed(segments=frozenset({"language"})),
    )
    assert segments(found) == [4, 2]


def test_fixed_layers_stay() -> None:
    model = image_model(layers=21)
    start = make_layout(model, 3, {})
    bench = workbench(model, HeadCosts(head=9))
    found = balance_layout(
        start, bench, POOL, MICROBATCHES, alike(busiest_rank), Fixed(layers=frozenset({"language"}))
    )
    assert layers(found.layout)[1] == layers(start)[1]
    assert layers(found.layout)[0] != layers(start)[0]


def test_a_gain_within_the_noise_changes_nothing() -> None:
    def barely_shorter(problem: Problem) -> Outcome:
        found = busiest_rank(problem)
        share = 1000 - 9 * (sum(problem.modules.values()) > 2)
        return replace(found, makespan_ns=found.makespan_ns * share // 1000)

    model = image_model()
    bench, start = workbench(model, HeadCosts()), make_layout(model, 2, {})
    probes = Probes(walk=fewer_bubbles, verdict=barely_shorter)
    found = balance_layout(start, bench, POOL, MICROBATCHES, probes)
    assert found.layout == start
    assert found.gain == 0


def test_a_gain_on_the_batches_seen_alone_changes_nothing() -> None:
    def longer(problem: Problem) -> Outcome:
        found = busiest_rank(problem)
        return replace(found, makespan_ns=found.makespan_ns * sum(problem.modules.values()))

    model = image_model()
    bench, start = workbench(model, HeadCosts()), make_layout(model, 2, {})
    probes = Probes(walk=fewer_bubbles, verdict=longer)
    assert balance_layout(start, bench, POOL, MICROBATCHES, probes).layout == start


def test_layouts_that_do_not_fit_are_passed_by() -> None:
    def capacity(layout: ChunkLayout) -> tuple[int, ...]:
        if layout.virtual_size == 3:
            raise InfeasibleError("weights alone do not fit")
        return (9,) * layout.pipeline_size

    model = image_model(vision=4, layers=4)
    start = make_layout(model, 2, {})
    bench = workbench(model, HeadCosts(), capacity)
    found = balance_layout(start, bench, POOL, MICROBATCHES, alike(fewer_bubbles))
    assert segments(found) == [2, 2]


def test_a_first_layout_that_does_not_fit_is_refused() -> None:
    def capacity(layout: ChunkLayout) -> tuple[int, ...]:
        raise InfeasibleError("weights alone do not fit")

    model = image_model()
    bench = workbench(model, HeadCosts(), capacity)
    with pytest.raises(InfeasibleError, match="do not fit"):
        balance_layout(make_layout(model, 2, {}), bench, POOL, MICROBATCHES, alike(busiest_rank))


def test_batches_are_drawn_alike_every_time_and_are_not_long() -> None:
    once, again = (expected_batches(POOL, 100, 3, seed=7) for _ in range(2))
    assert once == again
    assert once != expected_batches(POOL, 100, 3, seed=8)
    assert [len(one.microbatches) for one in once] == [32] * 3
    assert len(expected_batches(POOL, 5, 1)[0].microbatches) == 5
    assert all(one in POOL for batch in once for one in batch.microbatches)
