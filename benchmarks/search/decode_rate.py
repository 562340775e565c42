"""Stage executions a second of one decode, memory admission included, on one core.

    python benchmarks/search/decode_rate.py benchmarks/search/cases

A stage execution is one op: a forward, a backward, or a weight gradient. CPU time, best of five.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

from megatron_pipeweaver.ir.codec import problem_from_json
from megatron_pipeweaver.search.interleave import policy
from megatron_pipeweaver.search.native import NativeProblem

REPEATS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    args = parser.parse_args()
    for path in sorted(args.cases.glob("*.json.gz")):
        problem_name = path.name.removesuffix(".json.gz")
        native = NativeProblem(problem_from_json(gzip.decompress(path.read_bytes()), str(path)))
        counts = native.level_counts()
        for name, levels in (("fastest", [n - 1 for n in counts]), ("leanest", [0] * len(counts))):
            made = policy(native.problem, levels)
            best = float("inf")
            for _ in range(5):
                started = time.process_time()
                for _ in range(REPEATS):
                    table = native.core.decode(made)
                best = min(best, (time.process_time() - started) / REPEATS)
            ops = sum(map(len, table.order))
            rate = ops / best / 1e6
            print(f"{problem_name:10} {name:8} {rate:6.2f} M/s ({ops} in {best * 1e3:.3f} ms)")


if __name__ == "__main__":
    main()
