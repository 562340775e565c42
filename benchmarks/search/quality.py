r"""How good the searched schedules are: makespan over a reference and over the bound.

    python benchmarks/search/quality.py benchmarks/search/cases \
        --reference benchmarks/search/reference.csv --budgets 1 10 --threads 2 -o results.csv

`cases` holds gzipped `pipeweaver.problem/1` files; the reference is the best makespan of a plain
solver given 50 s on one core: one recompute level for the whole batch, a dual queue with a
banker's check, annealed group order, no split of the weight gradient. All ratios of a table come
from one run of this script. Every schedule is verified.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import time
from pathlib import Path

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, Exploration, SearchConfig
from megatron_pipeweaver.ir.codec import problem_from_json
from megatron_pipeweaver.search.anytime import solve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--exploration", type=Exploration, nargs="+", default=[Exploration.FULL])
    parser.add_argument("--no-split", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    reference: dict[str, float] = {}
    if args.reference:
        with args.reference.open() as file:
            reference = {r["problem"]: float(r["reference_ms"]) for r in csv.DictReader(file)}
    rows: list[dict[str, object]] = []
    problems = {
        path.name.removesuffix(".json.gz"): problem_from_json(
            gzip.decompress(path.read_bytes()), str(path)
        )
        for path in sorted(args.cases.glob("*.json.gz"))
    }
    for exploration in args.exploration:
        for budget in args.budgets:
            for seed in args.seeds:
                ratios: list[float] = []
                for name, problem in problems.items():
                    config = SearchConfig(
                        time_budget_ns=round(budget * SECOND_NS),
                        threads=args.threads,
                        seed=seed,
                        exploration=exploration,
                        split_weight_grad=not args.no_split,
                        choose_memory=not args.no_memory,
                    )
                    started = time.perf_counter()
                    result = solve(problem, config)
                    wall = time.perf_counter() - started
                    check_schedule(problem, result.schedule)
                    makespan_ms = result.schedule.makespan_ns / 1e6
                    row: dict[str, object] = {
                        "problem": name,
                        "exploration": exploration.value,
                        "budget_s": budget,
                        "seed": seed,
                        "makespan_ms": round(makespan_ms, 3),
                        "over_bound": round(1 + result.schedule.gap, 4),
                        "wall_s": round(wall, 3),
                        "first_ms": round(result.first_ns / 1e6, 2),
                        "evaluations": result.evaluations,
                    }
                    if name in reference:
                        ratios.append(makespan_ms / reference[name])
                        row["over_reference"] = round(ratios[-1], 4)
                    rows.append(row)
                    print(row, flush=True)
                if ratios:
                    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                    print(
                        f"{exploration} {budget} s seed {seed}: geometric mean {mean:.4f}, "
                        f"worst {max(ratios):.4f}",
                        flush=True,
                    )
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
