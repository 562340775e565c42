"""How close to its bound, and how fast, the native choice of strategies on one rank is.

    python benchmarks/search/memory_choice.py

512 stage pairs with 10 candidates each, alive for up to 40 forwards, memory from almost nothing to
almost enough; CPU time, best of five, the call's conversion of lists included.
"""

from __future__ import annotations

import random
import time
from itertools import accumulate

from megatron_pipeweaver._core import choose_candidates
from megatron_pipeweaver.search.memory import GAP, ROUNDS

PAIRS, CANDIDATES, ALIVE = 512, 10, 40


def main() -> None:
    draw = random.Random(1)
    lean = [draw.randrange(1, 5) for _ in range(PAIRS)]
    size = [draw.randrange(20, 200) for _ in range(PAIRS)]
    given = {
        "begin": list(range(PAIRS)),
        "until": [min(PAIRS, slot + draw.randrange(1, ALIVE)) for slot in range(PAIRS)],
        "candidate_begin": [0, *accumulate([CANDIDATES] * PAIRS)],
        "latency": [
            1000 + size[i] * (CANDIDATES - k) + draw.randrange(10)
            for i in range(PAIRS)
            for k in range(CANDIDATES)
        ],
        "memory": [lean[i] + size[i] * k // 2 for i in range(PAIRS) for k in range(CANDIDATES)],
    }
    for capacity in (500, 1000, 2500, 5000, 9000, 20000):
        for gap in (GAP, 0.0):
            best = float("inf")
            for _ in range(5):
                started = time.process_time()
                found = choose_candidates(**given, capacity=capacity, gap=gap, rounds=ROUNDS)
                best = min(best, time.process_time() - started)
            print(
                f"capacity {capacity:6}, asked for {gap:4.0%}: {best * 1e3:6.2f} ms, "
                f"gap {found.latency / found.bound - 1:.3%}"
            )


if __name__ == "__main__":
    main()
