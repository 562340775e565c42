"""Two systems by turns on the same ranks: when an iteration begins and ends, and what is told.

python -m benchmarks.runtime.equal      python -m benchmarks.gpu.shared
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

_START_AHEAD_NS = 50_000_000

Row = tuple[Any, ...]  # case, repeat, and one time in nanoseconds per column


def timed(run: Callable[[], object], group: dist.ProcessGroup | None = None) -> int:
    """Nanoseconds from an instant that all ranks start at to the end of the last one.

    Args:
        run: one iteration, to the device's last work.
        group: a CPU group of all ranks; the default one where that is one.
    """
    start = torch.tensor([time.perf_counter_ns() + _START_AHEAD_NS])
    dist.all_reduce(start, dist.ReduceOp.MAX, group=group)
    time.sleep(max(0.0, (int(start) - time.perf_counter_ns()) / 1e9))
    run()
    end = torch.tensor([time.perf_counter_ns()])
    dist.all_reduce(end, dist.ReduceOp.MAX, group=group)
    return int(end) - int(start)


def write_rows(path: Path, case: str, systems: Sequence[str], rows: Sequence[Row]) -> None:
    """`rows` as a table of milliseconds; a time that does not exist is `None` and left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([case, "repeat", *(f"{one}_ms" for one in systems)])
        for name, repeat, *times in rows:
            cells = ["" if one is None else f"{one / 1e6:.3f}" for one in times]
            writer.writerow([name, repeat, *cells])


def told_medians(systems: Sequence[str], rows: Sequence[Row], log: logging.Logger) -> None:
    """Log each case's medians, and what the first system's is of the second's."""
    for name in dict.fromkeys(row[0] for row in rows):
        columns = zip(*(row[2:] for row in rows if row[0] == name), strict=True)
        found = [median(column) if None not in column else None for column in columns]
        told = ", ".join(
            f"{system} {value / 1e6:.1f} ms"
            for system, value in zip(systems, found, strict=True)
            if value is not None
        )
        ratio = "" if found[1] is None else f", ratio {found[0] / found[1]:.4f}"
        log.info("%s: %s%s (medians)", name, told, ratio)
