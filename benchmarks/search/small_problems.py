"""Small scheduling problems, by seed, whose optimum an exact solver can prove."""

from __future__ import annotations

import random

from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from tests.property.problems import leanest_alone

UNIT_NS = 100_000
"""All times are multiples of this, so that solvers of integer problems get small numbers."""
UNIT_BYTES = 1 << 20

_SHAPES = (
    {"backbone": 1},
    {"backbone": 2},
    {"encoder": 1, "backbone": 1},
    {"encoder": 1, "backbone": 1},
    {"encoder": 1, "backbone": 2},
    {"encoder0": 1, "encoder1": 1, "backbone": 1},
    {"encoder": 1, "backbone": 1, "decoder": 1},
)
_SMALL = ({1: 8, 2: 14, 3: 18}, (1, 2, 2, 3, 3, 4))
_LARGER = ({1: 9, 2: 16, 3: 21}, (1, 2, 3, 3, 4, 4))
"""Most stage pairs by ranks (one machine alone is the harder proof), and microbatches to draw."""
LARGER = 1000
"""Problems from this seed on are larger; CP-SAT proves most of them, not all, within seconds."""


def small_problem(seed: int) -> Problem:
    """The problem of `seed`; even seeds have tight memory, odd ones room.

    1 to 3 ranks, 1 to 4 microbatches, 1 to 3 modules, up to 3 sub-microbatches per encoder, frozen
    modules, latencies, 1 to 3 strategies per stage pair, and times that differ from one
    microbatch to the next, as in multimodal batches.
    """
    random_ = random.Random(seed % LARGER)
    most_stage_pairs, microbatches = _LARGER if seed >= LARGER else _SMALL
    while True:
        problem = _draw(random_, microbatches, tight=seed % 2 == 0)
        pairs = sum(len(one.stages) for _, one in problem.passes())
        if 4 <= pairs <= most_stage_pairs[problem.pipeline_size]:
            return problem


def _draw(random_: random.Random, microbatches: tuple[int, ...], *, tight: bool) -> Problem:
    ranks = random_.choice((1, 2, 2, 2, 3, 3))
    modules = random_.choice(_SHAPES)
    frozen = {name for name in modules if name != "backbone" and random_.random() < 0.2}
    latency_ns = random_.choice((0, 1, 5)) * UNIT_NS
    scale = {name: random_.randint(8, 60) for name in modules}
    made = tuple(
        _microbatch(random_, ranks, modules, frozen, latency_ns, scale)
        for _ in range(random_.choice(microbatches))
    )
    lean = leanest_alone(ranks, made)
    room = random_.uniform(1.0, 1.6) if tight else random_.uniform(2.0, 5.0)
    return Problem(
        pipeline_size=ranks,
        memory_capacity_bytes=tuple(round(bytes_ * room) for bytes_ in lean),
        modules=modules,
        microbatches=made,
    )


def _microbatch(
    random_: random.Random,
    ranks: int,
    modules: dict[str, int],
    frozen: set[str],
    latency_ns: int,
    scale: dict[str, int],
) -> Microbatch:
    made: list[Pass] = []
    for module, segments in modules.items():
        encoder = module.startswith("encoder")
        for sub in range(random_.choice((0, 1, 1, 1, 2, 3)) if encoder else 1):
            after = [] if encoder else [(one.module, one.sub_microbatch) for one in made]
            if module == "decoder":
                after = [("backbone", 0)]
            load = scale[module] * random_.uniform(0.4, 1.6)
            made.append(
                Pass(
                    module=module,
                    sub_microbatch=sub,
                    after=tuple(after),
                    p2p_latency_ns=latency_ns,
                    stages=tuple(
                        _strategies(random_, load * random_.uniform(0.85, 1.15))
                        for _ in range(ranks * segments)
                    ),
                    frozen=module in frozen,
                )
            )
    return Microbatch(passes=tuple(made))


def _strategies(random_: random.Random, load: float) -> tuple[Strategy, ...]:
    """Keep, recompute and half of either, or the first one or two of them."""
    forward = max(1, round(load))
    backward = max(1, round(load * random_.uniform(0.9, 1.3)))
    weight = round(load * random_.uniform(0.6, 1.0))
    keep = max(4, round(load * random_.uniform(2.0, 4.0)))
    kinds = (("keep", 0.0), ("recompute", 1.0), ("half", 0.5))
    return tuple(
        Strategy(
            name=name,
            forward_ns=forward * UNIT_NS,
            backward_ns=(backward + round(forward * again)) * UNIT_NS,
            weight_grad_ns=weight * UNIT_NS,
            memory_bytes=max(1, round(keep * (1 - 0.9 * again))) * UNIT_BYTES,
        )
        for name, again in kinds[: random_.choice((1, 2, 2, 3))]
    )
