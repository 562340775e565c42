"""A large problem: 16 ranks, 256 microbatches, 3 modules; gap, wall time and memory of the process.

    python benchmarks/search/large.py

Times and memory of stage pairs follow the vision-language cases: 0 to 3 vision passes and 0 or 1
audio pass feed one language pass; five strategies from full recomputation to none. `loose` memory
holds what the fastest strategies need, `tight` about a third of that; between the two the gap shows
what memory forces, which the bound knows only where even waiting for nothing would fill it. Peak
memory is the process's own, and counts Python, the problem's objects and the check of the result.
"""

from __future__ import annotations

import argparse
import random
import resource
import time

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from megatron_pipeweaver.search.anytime import solve

RANKS, MICROBATCHES = 16, 256
MEMORY_BYTES = {
    "loose": 160 * 10**9,
    "110 GB": 110 * 10**9,
    "80 GB": 80 * 10**9,
    "65 GB": 65 * 10**9,
    "tight": 50 * 10**9,
}


def strategies(scale: float) -> tuple[Strategy, ...]:
    """Recompute 0, 1/4, ... of the layers; `scale` 1 is a language stage of 22 ms forward."""
    forward_ns, bytes_ = round(22e6 * scale), 2.8e9 * scale
    return tuple(
        Strategy(
            name=f"recompute_{quarter}_of_4",
            forward_ns=forward_ns,
            backward_ns=round(forward_ns * (1.2 + quarter / 4)),
            weight_grad_ns=round(forward_ns * 0.8),
            memory_bytes=round(bytes_ * (1 - 0.95 * quarter / 4)),
        )
        for quarter in range(5)
    )


def problem(memory_bytes: int, seed: int) -> Problem:
    draw = random.Random(seed)
    made = []
    for _ in range(MICROBATCHES):
        feeds = [
            Pass(
                module="vision",
                sub_microbatch=sub,
                stages=(strategies(0.5 + 0.3 * draw.random()),) * RANKS,
                p2p_latency_ns=700_000,
            )
            for sub in range(draw.randrange(4))
        ]
        if draw.random() < 0.5:
            audio = (strategies(0.2 + 0.2 * draw.random()),) * RANKS
            feeds.append(
                Pass(module="audio", sub_microbatch=0, stages=audio, p2p_latency_ns=200_000)
            )
        language = Pass(
            module="language",
            sub_microbatch=0,
            after=tuple((one.module, one.sub_microbatch) for one in feeds),
            stages=(strategies(1),) * RANKS,
            p2p_latency_ns=700_000,
        )
        made.append(Microbatch(passes=(*feeds, language)))
    return Problem(
        pipeline_size=RANKS,
        memory_capacity_bytes=(memory_bytes,) * RANKS,
        modules={"vision": 1, "audio": 1, "language": 1},
        microbatches=tuple(made),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name, memory_bytes in MEMORY_BYTES.items():
        made = problem(memory_bytes, seed=0)
        started = time.perf_counter()
        result = solve(
            made,
            SearchConfig(
                time_budget_ns=round(args.budget * SECOND_NS), threads=args.threads, seed=0
            ),
        )
        wall = time.perf_counter() - started
        searched_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        check_schedule(made, result.schedule)
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{name}: {sum(map(len, result.schedule.ranks))} ops, makespan "
            f"{result.schedule.makespan_ns / 1e6:.1f} ms, gap {result.schedule.gap:.2%}, first "
            f"{result.first_ns / 1e6:.1f} ms, wall {wall:.2f} s, {result.evaluations} evaluations, "
            f"peak {searched_mib:.0f} MiB ({mib:.0f} with the check), best static schedule "
            f"{min(result.baselines.values()) / 1e6:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
