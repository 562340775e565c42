r"""Sub-microbatch sizes: the makespan of emulated VLM-S for every B_i, and chosen batch by batch.

    python -m benchmarks.ablation.splits -o benchmarks/ablation/splits.csv

Run from the repository root. Each row is one batch under one size, or under the sizes that
`planner/splits.py` chooses from, with the same search time in all.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.jobs import STRATEGIES, Bench, capacity, load_bench, partition
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.partition.candidates import PerLayerCosts
from megatron_pipeweaver.partition.offline import Partition
from megatron_pipeweaver.partition.workload import Workload, make_workload
from megatron_pipeweaver.planner.splits import Alternative, Sizes, search_alternatives, split_sizes

COLUMNS = ("setup", "sizes", "batch", "chosen", "makespan_ns", "bound_ns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", default="vlm-s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16, 24, 48])
    parser.add_argument("--percent", type=int, nargs="+", default=[100, 67, 200])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--budget", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    bench = load_bench(args.setup, args.batches, args.microbatches)
    search = SearchConfig(time_budget_ns=round(args.budget * SECOND_NS), threads=args.threads)
    usual = partition(bench)
    (encoder,) = usual.sub_microbatch
    segments = {one.module: one.segments for one in usual.layout.modules}
    choices = {str(size): [{encoder: size}] for size in args.sizes}
    by_batch = [dict(one) for one in split_sizes(usual.sub_microbatch, args.percent)]
    choices["/".join(str(one[encoder]) for one in by_batch)] = by_batch
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, sizes in choices.items():
            # What layers work with for a while is set aside for the largest size.
            largest = max(sizes, key=lambda one: one[encoder])
            cut = partition(bench, largest, segments)
            room = capacity(bench, cut)
            total = 0
            for index, batch in enumerate(bench.batches):
                found = search_alternatives(
                    [
                        Alternative(
                            sizes=one, workload=_workload(bench, batch, cut, one, room), apart=True
                        )
                        for one in sizes
                    ],
                    search,
                )
                schedule = found.result.schedule
                check_schedule(found.of.workload.problem, schedule)
                total += schedule.makespan_ns
                writer.writerow(
                    (args.setup, name, index, found.of.sizes[encoder], schedule.makespan_ns,
                     schedule.lower_bound_ns)
                )  # fmt: skip
            print(f"B = {name}: mean {total / len(bench.batches) / 1e9:.3f} s", flush=True)


def _workload(
    bench: Bench, batch: BatchMetadata, cut: Partition, sizes: Sizes, room: Sequence[int]
) -> Workload:
    return make_workload(
        batch,
        bench.model,
        cut.layout,
        sizes,
        PerLayerCosts(bench.costs, STRATEGIES),
        room,
        parallel=bench.setup.parallel,
        element_bytes=bench.options.element_bytes,
    )


if __name__ == "__main__":
    main()
