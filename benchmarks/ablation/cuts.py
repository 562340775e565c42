"""The paper's cut and the one that `partition/balance.py` finds, by the schedules of other batches.

    python -m benchmarks.ablation.cuts -o benchmarks/ablation/cuts.csv

Run from the repository root. A case is a setup as the paper runs it, or on other parallel sizes:
``vlm-s@16x1`` is VLM-S on 16 pipeline ranks, 1 tensor-parallel. The cut is searched over batches of
a pool of microbatches (seed 1000), the rows are batches of seeds 0, 1, ... under the full search,
as long for either cut. `--table FILE` prints what the file holds.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.ablation.jobs import (
    STRATEGIES,
    Bench,
    capacity,
    draw,
    load_bench,
    partition,
    separated_problem,
)
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.ir.layout import ChunkLayout, layers_text
from megatron_pipeweaver.partition.balance import Balance, Workbench, balance_layout
from megatron_pipeweaver.partition.candidates import PerLayerCosts
from megatron_pipeweaver.partition.offline import Partition
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.brief import brief_searches
from megatron_pipeweaver.semu.model import AnalyticCostModel

CASES = (
    "vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l",
    "vlm-s@8x2", "vlm-s@16x1", "vlm-m@16x2", "vlm-l@16x4", "t2v-s@8x2", "t2v-s@16x1",
)  # fmt: skip
POOL_SEED = 1000
COLUMNS = (
    "case", "cut", "layers", "batch", "makespan_ns", "bound_ns", "search_s", "expected_gain",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each search")
    parser.add_argument("--rounds", type=int, help="end each search after so many rounds instead")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.table is not None:
        _print_table(args.table)
        return
    search = SearchConfig(
        time_budget_ns=round(args.budget * SECOND_NS) if args.rounds is None else 600 * SECOND_NS,
        max_rounds=args.rounds,
        threads=args.threads,
    )
    for case in args.cases:
        rows = _rows(case, load_case(case, args.batches, args.microbatches), search)
        fresh = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(COLUMNS)
            writer.writerows(rows)


def load_case(case: str, batches: int, microbatches: int) -> Bench:
    """The bench of ``SETUP`` or ``SETUP@PPxTP``."""
    name, _, sizes = case.partition("@")
    bench = load_bench(name, batches, microbatches)
    if not sizes:
        return bench
    pipeline, tensor = map(int, sizes.split("x"))
    parallel = replace(
        bench.setup.parallel, pipeline=pipeline, tensor=tensor, sequence_parallel=tensor > 1
    )
    options = replace(bench.options, parallel=parallel)
    return replace(
        bench,
        setup=replace(bench.setup, parallel=parallel),
        options=options,
        costs=AnalyticCostModel(bench.device, options, strategies=STRATEGIES),
    )


def search_cut(bench: Bench, cut: Partition, microbatches: int) -> Balance:
    """The cut of `bench` by the schedules of a pool of microbatches that no batch is made of."""

    def room(layout: ChunkLayout) -> tuple[int, ...]:
        return capacity(bench, replace(cut, layout=layout))

    work = Workbench(
        model=bench.model,
        sub_microbatch=cut.sub_microbatch,
        costs=PerLayerCosts(bench.costs, STRATEGIES),
        capacity_bytes=room,
        parallel=bench.setup.parallel,
        element_bytes=bench.options.element_bytes,
    )
    pool = draw(bench.model, 4 * microbatches, POOL_SEED)
    return balance_layout(cut.layout, work, pool, microbatches, brief_searches(SearchConfig()))


def _rows(case: str, bench: Bench, search: SearchConfig) -> list[tuple[object, ...]]:
    usual = partition(bench)
    begin = time.process_time()
    found = search_cut(bench, usual, len(bench.batches[0].microbatches))
    seconds = time.process_time() - begin
    cuts = {"paper": usual.layout, "searched": found.layout}
    total: dict[str, int] = {}
    rows: list[tuple[object, ...]] = []
    for name, layout in cuts.items():
        cut = replace(usual, layout=layout)
        room = capacity(bench, cut)
        for index, batch in enumerate(bench.batches):
            problem = separated_problem(bench, batch, cut, room)
            schedule = solve(problem, search).schedule
            check_schedule(problem, schedule)
            total[name] = total.get(name, 0) + schedule.makespan_ns
            rows.append(
                (case, name, layers_text(layout), index, schedule.makespan_ns,
                 schedule.lower_bound_ns, round(seconds, 1), round(found.gain, 4))
            )  # fmt: skip
    ratio = total["searched"] / total["paper"]
    print(f"{case}: {layers_text(found.layout)} in {seconds:.1f} s: {ratio:.4f}", flush=True)
    return rows


def _print_table(path: Path) -> None:
    """A case a row: mean seconds of either cut, their ratio, its least and largest of a batch."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    heads = ("case", "paper's cut", "searched", "paper's (s)", "searched (s)", "ratio",
             "of one batch", "search (CPU s)")  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---" * 8 + "|")
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        seconds: dict[str, list[float]] = {}
        for row in mine:
            seconds.setdefault(row["cut"], []).append(int(row["makespan_ns"]) / 1e9)
        old, new = seconds["paper"], seconds["searched"]
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        texts = {row["cut"]: row["layers"] for row in mine}
        means = [sum(one) / len(one) for one in (old, new)]
        print(
            f"| {case} | {texts['paper']} | {texts['searched']} | {means[0]:.3f} | {means[1]:.3f} "
            f"| {sum(new) / sum(old):.4f} | {min(ratios):.4f} to {max(ratios):.4f} "
            f"| {mine[0]['search_s']} |"
        )


if __name__ == "__main__":
    main()
