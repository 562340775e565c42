r"""What posting messages as one does on gloo: four messages of a rank pair, grouped and alone.

    python -m benchmarks.runtime.groups -o benchmarks/runtime/results/groups.csv

Two gloo ranks, by turns: the sender posts four messages in one call or in four, the receiver
likewise, then both wait. Gloo has no groups: the same calls are made one by one. What a group
saves on NCCL, a kernel for each further message, needs a GPU.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.runtime.transfer import Pending, ProcessGroupTransport
from tests.distributed.harness import RankContext, run_on_ranks

_log = logging.getLogger("groups")

SIZES = (1, 1024, 262_144)
"""Elements of a message, float32."""
COUNT = 4


def measure(ctx: RankContext, repeats: int) -> Any:
    """This rank's rows: (elements, posted as, repeat, post ns, whole ns)."""
    transport = ProcessGroupTransport(
        [(0, 1)], device=torch.device("cpu"), timeout=timedelta(seconds=60)
    )
    rows = []
    for size in SIZES:
        messages = [_message(sequence, size) for sequence in range(COUNT)]
        tensors = [torch.zeros(size) for _ in messages]
        for repeat in range(repeats):
            for name, groups in (
                ("grouped", [range(COUNT)]),
                ("alone", [[i] for i in range(COUNT)]),
            ):
                dist.barrier()
                started_ns = time.perf_counter_ns()
                pending = _post(ctx.rank, transport, messages, tensors, groups)
                posted_ns = time.perf_counter_ns()
                for one in pending:
                    one.wait()
                ended_ns = time.perf_counter_ns()
                rows.append((size, name, repeat, posted_ns - started_ns, ended_ns - started_ns))
    return rows


def _post(
    rank: int,
    transport: ProcessGroupTransport,
    messages: Sequence[Message],
    tensors: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
) -> list[Pending]:
    post: Callable[[Sequence[int]], Sequence[Pending]] = (
        (lambda group: transport.isend([messages[i] for i in group], [tensors[i] for i in group]))
        if rank == 0
        else (lambda group: transport.irecv([messages[i] for i in group]))
    )
    return [one for group in groups for one in post(group)]


def _message(sequence: int, size: int) -> Message:
    return Message(
        source=parse_op("language0.B0"),
        target=parse_op(f"vision1.B0.{sequence}"),
        source_rank=0,
        target_rank=1,
        sequence=sequence,
        shape=(size,),
        dtype="float32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    by_rank = run_on_ranks(measure, 2, args.repeats, deadline_s=200.0)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["elements", "posted", "sender_post_us", "receiver_post_us", "whole_us"])
        for size in SIZES:
            for name in ("grouped", "alone"):
                sender, receiver = (
                    [row[3:] for row in rows if row[:2] == (size, name)] for rows in by_rank
                )
                row = [
                    *(median(one[0] for one in rows) / 1e3 for rows in (sender, receiver)),
                    median(
                        max(one[1], other[1]) for one, other in zip(sender, receiver, strict=True)
                    )
                    / 1e3,
                ]
                writer.writerow([size, name, *(f"{one:.1f}" for one in row)])
                _log.info("%d elements, %s: %s us", size, name, ", ".join(f"{x:.1f}" for x in row))


if __name__ == "__main__":
    main()
