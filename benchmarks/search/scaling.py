r"""How exact solvers and the search fare as microbatches are added.

    python -m benchmarks.search.scaling run results/scaling.csv --microbatches 1 2 3 4
    python -m benchmarks.search.scaling plot results/scaling.csv results/scaling.svg

Run from the repository root with the `bench` extra installed. The problem is the first so many
microbatches of a case (VLM-M on four ranks by default). CP-SAT and HiGHS get the whole problem as
one model and `--limit` seconds, the search `--budget`, all of them the same number of threads.
Every better schedule is a row, and one more says how the solver ended and what processor time it
had. A problem's rows are
appended together, so the work can be done in parts.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.search import cp_sat, highs
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.ir.codec import problem_from_json
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.anytime import Improvement, solve

CASES = Path(__file__).parent / "cases"
COLUMNS = ("microbatches", "solver", "event", "seconds", "makespan_ns", "bound_ns", "cpu_s")
CLOSE = 1.01
"""A schedule counts as found at this factor of the best one that anybody found."""
Row = tuple[int, str, str, float, int | str, int | str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "plot"))
    parser.add_argument("csv", type=Path)
    parser.add_argument("svg", type=Path, nargs="?")
    parser.add_argument("--case", default="vlm-m-0")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--budget", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--solvers", nargs="+", default=list(_SOLVERS), choices=list(_SOLVERS))
    args = parser.parse_args()
    if args.what == "plot":
        _plot(_rows(args.csv), args.svg)
        return
    data = gzip.decompress((CASES / f"{args.case}.json.gz").read_bytes())
    whole = problem_from_json(data, args.case)
    for count in args.microbatches:
        problem = replace(whole, microbatches=whole.microbatches[:count])
        for name in args.solvers:
            limit_s = args.budget if name == "search" else args.limit
            before = time.process_time()
            rows = [(count, name, *row) for row in _SOLVERS[name](problem, limit_s, args.threads)]
            rows[-1] = (*rows[-1], round(time.process_time() - before, 1))
            _append(args.csv, rows)
            print(*rows[-1], flush=True)


def _searched(problem: Problem, limit_s: float, threads: int) -> Iterator[tuple[object, ...]]:
    found: list[Improvement] = []
    started = time.perf_counter()
    config = SearchConfig(time_budget_ns=round(limit_s * SECOND_NS), threads=threads)
    result = solve(problem, config, on_improvement=found.append)
    seconds = time.perf_counter() - started
    check_schedule(problem, result.schedule)
    for one in found:
        yield "better", round(one.elapsed_ns / 1e9, 4), one.makespan_ns, ""
    schedule = result.schedule
    yield "ended", round(seconds, 3), schedule.makespan_ns, schedule.lower_bound_ns


def _by_cp_sat(problem: Problem, limit_s: float, threads: int) -> Iterator[tuple[object, ...]]:
    found: list[tuple[int, float]] = []
    result = cp_sat.solve(
        problem,
        limit_s=limit_s,
        threads=threads,
        on_improvement=lambda makespan, seconds: found.append((makespan, seconds)),
    )
    for makespan, seconds in found:
        yield "better", round(seconds, 4), makespan, ""
    if result.schedule is not None:
        check_schedule(problem, result.schedule)
    event = "proven" if result.proven else "ended"
    yield event, round(result.seconds, 3), result.makespan_ns or "", result.bound_ns


def _by_highs(problem: Problem, limit_s: float, threads: int) -> Iterator[tuple[object, ...]]:
    found: list[tuple[int, float]] = []
    makespan_ns, bound_ns, proven, seconds = highs.solve(
        problem,
        limit_s=limit_s,
        threads=threads,
        on_improvement=lambda makespan, seconds: found.append((makespan, seconds)),
    )
    for makespan, at in found:
        yield "better", round(at, 4), makespan, ""
    yield "proven" if proven else "ended", round(seconds, 3), makespan_ns or "", bound_ns


_SOLVERS = {"search": _searched, "cp-sat": _by_cp_sat, "highs": _by_highs}


def _append(path: Path, rows: list[tuple[object, ...]]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _plot(rows: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot

    counts = sorted({int(row["microbatches"]) for row in rows})
    best = {
        count: min(
            int(row["makespan_ns"]) for row in rows if _of(row, count) and row["makespan_ns"]
        )
        for count in counts
    }
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6))
    for name, marker in zip(_SOLVERS, "os^", strict=True):
        mine = [row for row in rows if row["solver"] == name]
        close = [_seconds_to(mine, count, best[count] * CLOSE) for count in counts]
        upper.plot(counts, close, marker=marker, label=f"{name}: within 1 % of the best")
        proven = [(_seconds_of_proof(mine, count)) for count in counts]
        if name != "search":
            upper.plot(counts, proven, marker=marker, ls=":", label=f"{name}: optimum proven")
        over = [_final(mine, count) / best[count] for count in counts]
        lower.plot(counts, over, marker=marker, label=name)
    upper.set(yscale="log", ylabel="search time (s)")
    lower.set(xscale="log", xlabel="microbatches", ylabel="makespan over the best found")
    lower.set_xticks(counts, [str(count) for count in counts], minor=False)
    lower.minorticks_off()
    for axes in (upper, lower):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _of(row: dict[str, str], count: int) -> bool:
    return int(row["microbatches"]) == count


def _seconds_to(rows: list[dict[str, str]], count: int, makespan_ns: float) -> float:
    times = [
        float(row["seconds"])
        for row in rows
        if _of(row, count) and row["makespan_ns"] and int(row["makespan_ns"]) <= makespan_ns
    ]
    return min(times, default=math.nan)


def _seconds_of_proof(rows: list[dict[str, str]], count: int) -> float:
    proofs = [float(row["seconds"]) for row in rows if _of(row, count) and row["event"] == "proven"]
    return min(proofs, default=math.nan)


def _final(rows: list[dict[str, str]], count: int) -> float:
    found = [int(row["makespan_ns"]) for row in rows if _of(row, count) and row["makespan_ns"]]
    return min(found, default=math.nan)


if __name__ == "__main__":
    main()
