r"""Small problems against their optimum, which CP-SAT proves.

    python -m benchmarks.search.small exact  results/small_exact.csv --seeds 0 200 --threads 1
    python -m benchmarks.search.small search results/small_exact.csv results/small.csv --budget 1

Run from the repository root with the `bench` extra installed. The first command may be stopped and
started again: it goes on behind the last seed in its file. The second solves the same problems,
verifies every schedule and compares; problems whose optimum is not proven do not count.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from benchmarks.search.cp_sat import solve as solve_exactly
from benchmarks.search.small_problems import LARGER, small_problem
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.search.anytime import solve

EXACT_COLUMNS = (
    "seed",
    "ranks",
    "microbatches",
    "stage_pairs",
    "proven",
    "optimum_ns",
    "bound_ns",
    "seconds",
)
SEARCH_COLUMNS = (
    "seed",
    "ranks",
    "microbatches",
    "stage_pairs",
    "tight",
    "optimum_ns",
    "makespan_ns",
    "over_optimum",
    "lower_bound_ns",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("exact", "search"))
    parser.add_argument("exact", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 200))
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one proof")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for one search")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "exact":
        _prove(args.exact, range(*args.seeds), args.limit, args.threads)
    else:
        _compare(args.exact, args.output, args.budget, args.threads)


def _prove(path: Path, seeds: range, limit_s: float, threads: int) -> None:
    done = {int(row["seed"]) for row in _rows(path)} if path.exists() else set()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(EXACT_COLUMNS)
        for seed in seeds:
            if seed in done:
                continue
            problem = small_problem(seed)
            quick = SearchConfig(time_budget_ns=SECOND_NS // 5, threads=1)
            hint = solve(problem, quick).schedule
            exact = solve_exactly(problem, limit_s=limit_s, threads=threads, hint=hint)
            if exact.schedule is not None:
                check_schedule(problem, exact.schedule)
            pairs = sum(len(one.stages) for _, one in problem.passes())
            row = (
                seed,
                problem.pipeline_size,
                len(problem.microbatches),
                pairs,
                int(exact.proven),
                exact.makespan_ns,
                exact.bound_ns,
                round(exact.seconds, 2),
            )
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)


def _compare(exact: Path, output: Path, budget_s: float, threads: int) -> None:
    over: dict[str, list[float]] = {"small": [], "larger": []}
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(SEARCH_COLUMNS)
        for row in _rows(exact):
            if row["proven"] != "1":
                continue
            seed, optimum_ns = int(row["seed"]), int(row["optimum_ns"])
            problem = small_problem(seed)
            config = SearchConfig(time_budget_ns=round(budget_s * SECOND_NS), threads=threads)
            schedule = solve(problem, config).schedule
            check_schedule(problem, schedule)
            assert schedule.lower_bound_ns <= optimum_ns <= schedule.makespan_ns, seed
            excess = schedule.makespan_ns / optimum_ns - 1
            over["larger" if seed >= LARGER else "small"].append(excess)
            writer.writerow(
                (
                    seed,
                    row["ranks"],
                    row["microbatches"],
                    row["stage_pairs"],
                    int(seed % 2 == 0),
                    optimum_ns,
                    schedule.makespan_ns,
                    round(excess, 5),
                    schedule.lower_bound_ns,
                )
            )
            if excess > 0.02:
                print(f"seed {seed}: {excess:.2%} over the optimum", flush=True)
    for name, values in over.items():
        if values:
            print(name, _summary(values, budget_s, threads))


def _summary(over: list[float], budget_s: float, threads: int) -> str:
    count = len(over)
    return (
        f"{count} problems with a proven optimum, {budget_s} s on {threads} threads: "
        f"{sum(one == 0 for one in over) / count:.1%} optimal, "
        f"{sum(one <= 0.02 for one in over) / count:.1%} within 2 %, "
        f"mean {sum(over) / count:.3%}, worst {max(over):.2%}"
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
