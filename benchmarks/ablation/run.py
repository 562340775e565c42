r"""Emulated iterations of the paper's setups: its ablation, and static systems beside ours.

    python -m benchmarks.ablation.run vlm-s vlm-m -o benchmarks/ablation/result.csv

Run from the repository root. A setup's rows are appended to the file together, one row per system
and batch, without systems that fit no batch; `--table FILE` prints what the file holds.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from benchmarks.ablation.jobs import load_bench
from benchmarks.ablation.systems import SYSTEMS, Run, load_case, memory
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.errors import InfeasibleError

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
        done: dict[str, Run] = {}
        for name in args.systems:
            started = time.perf_counter()
            try:
                run = (
                    memory(case, done.get("reordering"))
                    if name == "memory"
                    else SYSTEMS[name](case)
                )
            except InfeasibleError as error:
                print(f"  {name:<15} {error}", flush=True)
                continue
            done[name] = run
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
        _print_table(setup, [row for row in rows if row["setup"] == setup])


def _print_table(setup: str, rows: list[dict[str, str]]) -> None:
    """Seconds by batch, the share of Megatron's mean, and by how much PipeWeaver is faster."""
    seconds: dict[str, list[float]] = {}
    settings = {row["system"]: row["setting"] for row in rows}
    for row in rows:
        seconds.setdefault(row["system"], []).append(int(row["makespan_ns"]) / 1e9)
    ours, theirs = seconds["pipeweaver"], seconds["megatron"]
    paper = PAPER_S if setup == "vlm-s" else {}
    heads = [f"batch {batch}" for batch in range(len(ours))]
    heads += ["mean (s)", "of Megatron", "PipeWeaver is faster by", "setting"]
    heads += ["paper (s)", "of Megatron"] if paper else []
    print(f"\n| {setup} | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for name, values in seconds.items():
        gains = [other / one - 1 for other, one in zip(values, ours, strict=True)]
        cells = [f"{one:.3f}" for one in values]
        cells += [f"{sum(values) / len(values):.3f}", f"{sum(values) / sum(theirs):.1%}"]
        faster = f"{sum(values) / sum(ours) - 1:.1%} ({min(gains):.1%} to {max(gains):.1%})"
        cells += ["" if name in ("pipeweaver", "bound") else faster, settings[name]]
        if paper:
            found = paper.get(name)
            cells += [f"{found:.2f}", f"{found / paper['megatron']:.1%}"] if found else ["", ""]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
