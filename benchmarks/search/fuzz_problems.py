"""Nasty scheduling problems, by seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from tests.property.problems import leanest_alone

Draw = Callable[[], int]


def fuzz_problem(seed: int) -> Problem:
    """The problem of `seed`.

    1 to 4 ranks; 0 to 3 encoders, a backbone or none, 0 to 2 decoders behind it, each in 1 or 2
    segments; 0 to 5 microbatches; modules and passes that are frozen, chained or missing; passes
    without any work; times that are all alike, small, or up to eight orders of magnitude apart;
    memory from exactly what the largest microbatch needs alone, all of its stages at their
    leanest, to plenty of it, and for some less than that.
    """
    random_ = random.Random(seed)
    ranks = random_.choice((1, 1, 2, 2, 3, 4))
    names = [f"encoder{index}" for index in range(random_.randint(0, 3))]
    names += ["backbone"]
    names += [f"decoder{index}" for index in range(random_.choice((0, 0, 1, 2)))]
    modules = {name: random_.choice((1, 1, 2)) for name in names}
    maker = _Maker(random_, ranks, modules)
    microbatches = tuple(maker.microbatch() for _ in range(random_.randint(0, 5)))
    lean = leanest_alone(ranks, microbatches)
    room = random_.choice((0.0, 0.0, 0.1, 1.0, 10.0, -0.3))
    return Problem(
        pipeline_size=ranks,
        memory_capacity_bytes=tuple(bytes_ + round(bytes_ * room) for bytes_ in lean),
        modules=modules,
        microbatches=microbatches,
    )


class _Maker:
    """Microbatches of one problem, whose times are drawn in one way."""

    def __init__(self, random_: random.Random, ranks: int, modules: dict[str, int]) -> None:
        self._random = random_
        self._ranks = ranks
        self._modules = modules
        draws: tuple[Draw, ...] = (
            lambda: 1,
            lambda: random_.randint(0, 3),
            lambda: random_.randint(0, 40),
            lambda: round(10 ** random_.uniform(0, 8)),
            lambda: random_.choice((0, 1, 10**9)),
        )
        self._time = random_.choice(draws)
        self._bytes = random_.choice(draws)
        self._latency = random_.choice((0, 0, 1, 7, 10**6))
        self._frozen = {name for name in modules if random_.random() < 0.15}

    def microbatch(self) -> Microbatch:
        made: list[Pass] = []
        encoded: list[tuple[str, int]] = []
        backbone = self._random.random() < 0.85
        for module in self._modules:
            count = 1 if module == "backbone" else self._random.randint(0, 3)
            for sub in range(count if module != "backbone" or backbone else 0):
                made.append(self._pass(module, sub, self._after(module, encoded, backbone)))
                if module.startswith("encoder"):
                    encoded.append((module, sub))
        return Microbatch(passes=tuple(made))

    def _after(
        self, module: str, encoded: list[tuple[str, int]], backbone: bool
    ) -> list[tuple[str, int]]:
        if module == "backbone":
            return encoded
        if module.startswith("decoder"):
            return [("backbone", 0)] if backbone else encoded[-1:]
        return encoded[-1:] if self._random.random() < 0.3 else []

    def _pass(self, module: str, sub: int, after: list[tuple[str, int]]) -> Pass:
        idle = self._random.random() < 0.08
        return Pass(
            module=module,
            sub_microbatch=sub,
            after=tuple(after),
            p2p_latency_ns=self._latency,
            stages=tuple(
                self._strategies(idle=idle) for _ in range(self._ranks * self._modules[module])
            ),
            frozen=module in self._frozen or self._random.random() < 0.05,
        )

    def _strategies(self, *, idle: bool) -> tuple[Strategy, ...]:
        return tuple(
            Strategy(
                name=f"s{index}",
                forward_ns=0 if idle else self._time(),
                backward_ns=0 if idle else self._time(),
                weight_grad_ns=0 if idle else self._time(),
                memory_bytes=0 if idle else self._bytes(),
            )
            for index in range(self._random.randint(1, 4))
        )
