r"""Makespan over search time: the full search, the paper's MCTS, DFS and random orders.

    python -m benchmarks.search.anytime run results/anytime.csv --cases vlm-s-0 t2v-l-1
    python -m benchmarks.search.anytime plot results/anytime.csv results/anytime.svg

Run from the repository root with the `bench` extra installed. Every better schedule is a row; a
case's rows are appended together, so the work can be done in parts.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, Exploration, SearchConfig
from megatron_pipeweaver.ir.codec import problem_from_json
from megatron_pipeweaver.search.anytime import Improvement, solve

CASES = Path(__file__).parent / "cases"
COLUMNS = ("case", "exploration", "seconds", "makespan_ns", "bound_ns", "evaluations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "plot"))
    parser.add_argument("csv", type=Path)
    parser.add_argument("svg", type=Path, nargs="?")
    parser.add_argument("--cases", nargs="+", default=["vlm-s-0", "vlm-l-0", "t2v-s-0", "t2v-l-1"])
    parser.add_argument("--budget", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "plot":
        _plot(args.csv, args.svg)
        return
    for case in args.cases:
        rows: list[tuple[object, ...]] = []
        for exploration in Exploration:
            rows += _searched(case, exploration, args.budget, args.threads)
            print(*rows[-1], flush=True)
        fresh = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(COLUMNS)
            writer.writerows(rows)


def _searched(
    case: str, exploration: Exploration, budget_s: float, threads: int
) -> list[tuple[object, ...]]:
    problem = problem_from_json(
        gzip.decompress((CASES / f"{case}.json.gz").read_bytes()), f"{case}.json.gz"
    )
    config = SearchConfig(
        time_budget_ns=round(budget_s * SECOND_NS), threads=threads, exploration=exploration
    )
    found: list[Improvement] = []
    result = solve(problem, config, on_improvement=found.append)
    check_schedule(problem, result.schedule)
    bound_ns = result.schedule.lower_bound_ns
    steps = [(one.elapsed_ns, one.makespan_ns, one.evaluations) for one in found]
    steps.append((result.elapsed_ns, result.schedule.makespan_ns, result.evaluations))
    return [
        (case, exploration.value, round(elapsed_ns / 1e9, 4), makespan_ns, bound_ns, evaluations)
        for elapsed_ns, makespan_ns, evaluations in steps
    ]


def _plot(source: Path, path: Path) -> None:
    from matplotlib import pyplot

    with source.open() as file:
        rows = list(csv.DictReader(file))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(2, -(-len(cases) // 2), figsize=(9, 6), squeeze=False)
    for case, one in zip(cases, axes.flat, strict=False):
        for exploration in Exploration:
            mine = [r for r in rows if (r["case"], r["exploration"]) == (case, exploration.value)]
            seconds = [float(row["seconds"]) for row in mine]
            ratios = [int(row["makespan_ns"]) / int(row["bound_ns"]) for row in mine]
            one.step(seconds, ratios, where="post", label=exploration.value)
        one.set(title=case, xscale="log", xlabel="search time (s)", ylabel="makespan / bound")
        one.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
