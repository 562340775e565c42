"""Random scheduling problems, small and nasty, for every property test to draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy

TIMES = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from([0, 1, 1000]))
BYTES = st.one_of(st.integers(0, 4), st.integers(0, 40))


@st.composite
def stage_strategies(draw: st.DrawFn, most: int = 3) -> tuple[Strategy, ...]:
    """One to `most` candidate strategies, not sorted in any way."""
    return tuple(
        Strategy(
            name=f"s{index}",
            forward_ns=draw(TIMES),
            backward_ns=draw(TIMES),
            weight_grad_ns=draw(TIMES),
            memory_bytes=draw(BYTES),
        )
        for index in range(draw(st.integers(1, most)))
    )


@st.composite
def passes_of_microbatch(draw: st.DrawFn, ranks: int, modules: dict[str, int]) -> Microbatch:
    """Encoders, then the backbone, then decoders; any of them may be missing or frozen."""
    made: list[Pass] = []

    def add(module: str, sub: int, after: list[tuple[str, int]]) -> None:
        made.append(
            Pass(
                module=module,
                sub_microbatch=sub,
                after=tuple(after),
                p2p_latency_ns=draw(st.sampled_from([0, 0, 1, 7])),
                stages=tuple(draw(stage_strategies()) for _ in range(ranks * modules[module])),
                frozen=draw(st.sampled_from([False, False, False, True])),
            )
        )

    encoded: list[tuple[str, int]] = []
    for module in modules:
        if module.startswith("encoder"):
            for sub in range(draw(st.integers(0, 2))):
                chained = draw(st.booleans()) and bool(encoded)
                add(module, sub, encoded[-1:] if chained else [])
                encoded.append((module, sub))
    backbone = draw(st.sampled_from([True, True, True, False]))
    if backbone:
        add("backbone", 0, encoded)
    for module in modules:
        if module.startswith("decoder"):
            for sub in range(draw(st.integers(0, 2))):
                add(module, sub, [("backbone", 0)] if backbone else encoded[-1:])
    return Microbatch(passes=tuple(made))


@st.composite
def problems(draw: st.DrawFn, most_microbatches: int = 4, tight: bool | None = None) -> Problem:
    """A problem in which every microbatch fits alone.

    Args:
        draw: given by hypothesis.
        most_microbatches: upper limit.
        tight: the capacity is what the largest microbatch needs at its leanest strategies and not
            a byte more; None draws either that or some more.
    """
    ranks = draw(st.integers(1, 4))
    names = [f"encoder{i}" for i in range(draw(st.integers(0, 3)))]
    names += ["backbone"]
    names += [f"decoder{i}" for i in range(draw(st.integers(0, 2)))]
    modules = {name: draw(st.sampled_from([1, 1, 2])) for name in names}
    microbatches = tuple(
        draw(passes_of_microbatch(ranks, modules))
        for _ in range(draw(st.integers(0, most_microbatches)))
    )
    lean = leanest_alone(ranks, microbatches)
    loose = 0 if tight or (tight is None and draw(st.booleans())) else draw(st.integers(0, 200))
    return Problem(
        pipeline_size=ranks,
        memory_capacity_bytes=tuple(bytes_ + loose for bytes_ in lean),
        modules=modules,
        microbatches=microbatches,
    )


def leanest_alone(ranks: int, microbatches: tuple[Microbatch, ...]) -> list[int]:
    """Per rank, memory that is enough for any one microbatch, all of its stages held at once.

    Frozen passes hold memory one stage at a time.
    """
    worst = [0] * ranks
    for microbatch in microbatches:
        held, transient = [0] * ranks, [0] * ranks
        for one in microbatch.passes:
            for stage, strategies in enumerate(one.stages):
                least = min(strategy.memory_bytes for strategy in strategies)
                rank = stage % ranks
                if one.frozen:
                    transient[rank] = max(transient[rank], least)
                else:
                    held[rank] += least
        worst = [max(before, a + b) for before, a, b in zip(worst, held, transient, strict=True)]
    return worst
