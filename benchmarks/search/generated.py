"""The search on problems that are not among the cases: other batches of the paper's five setups.

    python -m benchmarks.search.generated -o benchmarks/search/results/generated.csv

Run from the repository root. Every batch is drawn anew (`benchmarks.paced.cases`) and becomes a
problem as the planner makes it, with up to ten candidates per stage pair. `over_bound`
is makespan over the proven bound, `static` the best static schedule's makespan over the search's,
`contiguous` that of 1F1B on the best contiguous cut (`search.contiguous`).
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

from benchmarks.paced.cases import SETUPS, draw_batches, make_job, make_planner
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.baselines import schedule
from megatron_pipeweaver.search.contiguous import contiguous

COLUMNS = ("setup", "seed", "ops", "makespan_ms", "over_bound", "static", "contiguous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--budget", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    search = SearchConfig(
        time_budget_ns=round(args.budget * SECOND_NS), threads=args.threads, seed=0
    )
    rows: list[tuple[str | int | float, ...]] = []
    for setup in SETUPS:
        for seed in range(args.first_seed, args.first_seed + args.batches):
            (batch,) = drawn = draw_batches(setup, 1, args.microbatches, seed)
            planner = make_planner(make_job(setup, drawn), drawn, search)
            rows.append((setup, seed, *_compared(planner.workload(batch).problem, search)))
            print(*rows[-1], flush=True)
    with args.output.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    for index, name in enumerate(COLUMNS[4:], start=4):
        known = [float(row[index]) for row in rows if not math.isnan(float(row[index]))]
        mean = math.exp(sum(map(math.log, known)) / len(known))
        print(f"{name}: geometric mean {mean:.3f}, {min(known):.3f} to {max(known):.3f}")


def _compared(problem: Problem, search: SearchConfig) -> tuple[int | float, ...]:
    result = solve(problem, search)
    found = result.schedule
    check_schedule(problem, found)
    return (
        sum(map(len, found.ranks)),
        round(found.makespan_ns / 1e6, 1),
        round(found.makespan_ns / found.lower_bound_ns, 4),
        round(min(result.baselines.values()) / found.makespan_ns, 4),
        round(_contiguous_ns(problem) / found.makespan_ns, 4),
    )


def _contiguous_ns(problem: Problem) -> float:
    """NaN where the cut does not fit: its first rank holds most of the encoder."""
    recut = contiguous(problem)
    try:
        made = schedule(recut, "one_f_one_b")
    except InfeasibleError:
        return math.nan
    check_schedule(recut, made)
    return made.makespan_ns


if __name__ == "__main__":
    main()
