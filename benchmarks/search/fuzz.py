r"""Nasty problems by seed, each solved in four ways; every schedule is verified in plain Python.

    python -m benchmarks.search.fuzz --problems 20000 -o benchmarks/search/results/fuzz.csv

Run from the repository root. Goes on behind the last row of its file, so it may be stopped and
started again; `--chunks` ends it after so many rows. The first schedule that the verifier refuses
ends the run with an error that names the seed, and so does a problem that takes over a minute.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import time
from collections import Counter
from pathlib import Path

from benchmarks.search.fuzz_problems import fuzz_problem
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import Exploration, SearchConfig
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.anytime import solve

WAYS = (
    SearchConfig(max_rounds=25),
    SearchConfig(max_rounds=15, split_weight_grad=False),
    SearchConfig(max_rounds=15, deterministic=True),
    SearchConfig(max_rounds=12, exploration=Exploration.MCTS, threads=2),
)
CHUNK = 200
COLUMNS = ("first_seed", "problems", "schedules", "infeasible", "order_impossible", "one_rank",
           "without_encoder", "frozen", "slowest_s", "seconds")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--chunks", type=int, help="end after so many rows")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = _rows(args.output)
    start = sum(int(row["problems"]) for row in rows)
    firsts = range(start, args.problems, CHUNK)[: args.chunks]
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for first in firsts:
            row = _chunk(first, min(CHUNK, args.problems - first))
            writer.writerow(row)
            file.flush()
            print(row, flush=True)
    print(_summary(_rows(args.output)))


def _chunk(first: int, problems: int) -> dict[str, int | float]:
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    slowest = 0.0
    for seed in range(first, first + problems):
        faulthandler.dump_traceback_later(60, exit=True)
        before = time.perf_counter()
        try:
            counts.update(_solved(fuzz_problem(seed)))
        except BaseException as error:
            error.add_note(f"fuzz: seed {seed}")
            raise
        slowest = max(slowest, time.perf_counter() - before)
    faulthandler.cancel_dump_traceback_later()
    return {
        "first_seed": first,
        "problems": problems,
        **{name: counts[name] for name in COLUMNS[2:-2]},
        "slowest_s": round(slowest, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _solved(problem: Problem) -> Counter[str]:
    passes = [one for _, one in problem.passes()]
    counts = Counter(
        one_rank=int(problem.pipeline_size == 1),
        without_encoder=int(not any(name.startswith("encoder") for name in problem.modules)),
        frozen=int(any(one.frozen for one in passes)),
    )
    for config in WAYS:
        try:
            result = solve(problem, config)
        except InfeasibleError:
            counts["infeasible"] += 1
            continue
        except ConfigError:
            # Passes that are chained against the order that `deterministic` asks for.
            assert config.deterministic
            counts["order_impossible"] += 1
            continue
        check_schedule(problem, result.schedule)
        counts["schedules"] += 1
    return counts


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _summary(rows: list[dict[str, str]]) -> str:
    total = {name: sum(int(row[name]) for row in rows) for name in COLUMNS[1:-2]}
    return (
        f"{total['problems']} problems ({total['one_rank']} on one rank, "
        f"{total['without_encoder']} without an encoder, {total['frozen']} with frozen passes), "
        f"{len(WAYS)} ways each: {total['schedules']} schedules, all valid; {total['infeasible']} "
        f"times infeasible, {total['order_impossible']} times no order of backwards; slowest "
        f"{max(float(row['slowest_s']) for row in rows):.2f} s"
    )


if __name__ == "__main__":
    main()
