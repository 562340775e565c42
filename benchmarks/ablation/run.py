r"""Emulated iterations of the paper's setups: its ablation, and static systems beside ours.

    python -m benchmarks.ablation.run vlm-s vlm-m -o benchmarks/ablation/result.csv

Run from the repository root. A setup's rows are appended to the file together, one row per system
and batch; `--table FILE` prints what the file holds.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from benchmarks.ablation.jobs import load_bench
from benchmarks.ablation.systems import SYSTEMS, load_case
from megatron_pipeweaver.config import SECOND_NS, SearchConfig

COLUMNS = ("setup", "system", "setting", "batch", "makespan_ns")
PAPER_S = {
    "megatron": 26.13,
    "partitioner": 22.27,
    "interleaving": 18.81,
    "reordering": 17.61,
    "memory": 16.05,
}
"""Seconds per iteration of VLM-S on 16 H800 in the paper's ablation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setups", nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    args = parser.parse_args()
    if args.table is not None:
        _print_tables(args.table)
        return
    search = SearchConfig(time_budget_ns=round(args.budget * SECOND_NS), threads=args.threads)
    for setup in args.setups:
        case = load_case(load_bench(setup, args.batches, args.microbatches), search)
        cuts = {one.module: one.segments for one in case.cut.layout.modules}
        print(f"{setup}: segments {cuts}, sub-microbatches {dict(case.cut.sub_microbatch)}")
        rows: list[tuple[object, ...]] = []
        for name in args.systems:
            started = time.perf_counter()
            run = SYSTEMS[name](case)
            rows += [
                (setup, name, run.setting, batch, makespan)
                for batch, makespan in enumerate(run.makespans_ns)
            ]
            seconds = " ".join(f"{one / 1e9:7.3f}" for one in run.makespans_ns)
            took = time.perf_counter() - started
            print(f"  {name:14} {seconds} s   {run.setting} ({took:.0f} s)", flush=True)
        fresh = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(COLUMNS)
            writer.writerows(rows)


def _print_tables(path: Path) -> None:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for setup in dict.fromkeys(row["setup"] for row in rows):
        mine = [row for row in rows if row["setup"] == setup]
        batches = sorted({int(row["batch"]) for row in mine})
        heads = " | ".join(f"batch {batch}" for batch in batches)
        print(f"\n| {setup} | {heads} | mean (s) | of Megatron | paper (s) | of Megatron |")
        print("|---" * (len(batches) + 5) + "|")
        means = {}
        for name in dict.fromkeys(row["system"] for row in mine):
            seconds = [int(row["makespan_ns"]) / 1e9 for row in mine if row["system"] == name]
            means[name] = sum(seconds) / len(seconds)
            share = f"{means[name] / means['megatron']:.1%}" if "megatron" in means else ""
            paper = PAPER_S.get(name) if setup == "vlm-s" else None
            theirs = f"{paper:.2f} | {paper / PAPER_S['megatron']:.1%}" if paper else " | "
            cells = " | ".join(f"{one:.3f}" for one in seconds)
            print(f"| {name} | {cells} | {means[name]:.3f} | {share} | {theirs} |")


if __name__ == "__main__":
    main()
