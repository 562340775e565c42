"""``pipeweaver tune``: which parallel sizes train a job fastest on its ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_pipeweaver.cli.emulate import (
    add_balance_argument,
    add_cache_argument,
    balance_probes,
    cut,
    heading,
    kept,
    searched,
)
from megatron_pipeweaver.cli.job_files import load_job
from megatron_pipeweaver.cli.search_flags import add_search_arguments, search_config
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.partition.tune import Candidate, parallel_choices, tune
from megatron_pipeweaver.semu.reuse import DiskCache, Reuse
from megatron_pipeweaver.view.report import format_table
from megatron_pipeweaver.view.units import milliseconds, percent, size

HELP = "rank the parallel sizes that fit a job file's ranks, fastest first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("job", type=Path, help="a pipeweaver.job/1 file")
    parser.add_argument(
        "--top", type=int, metavar="N", help="print so many candidates (default: all that fit)"
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="context-parallel sizes to try (default: 1 alone)",
    )
    parser.add_argument(
        "--expert",
        type=int,
        nargs="+",
        metavar="N",
        help="expert-parallel sizes to try (default: all that divide the experts)",
    )
    add_cache_argument(parser)
    add_balance_argument(parser)
    add_search_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Try, rank, print; the exit code."""
    config = search_config(args)
    file = load_job(args.job)
    for name, sizes in (("context", args.context), ("expert", args.expert or [1])):
        if min(sizes) < 1:
            raise ConfigError(f"tune: {name}-parallel size {min(sizes)}; need at least 1")
    choices = tuple(
        parallel_choices(
            file.ranks,
            len(file.job.microbatches),
            file.job.device,
            file.job.model,
            contexts=sorted(set(args.context)),
            experts=None if args.expert is None else sorted(set(args.expert)),
        )
    )
    reuse, disk = Reuse(), None if args.cache is None else DiskCache(args.cache)
    found = tune(
        file.job,
        file.ranks,
        searched(config),
        choices=choices,
        reuse=reuse,
        disk=disk,
        balance=balance_probes(args, config),
    )
    print(f"{heading(file.job, file.ranks)}: {len(found)} candidates fit\n")
    print(_table(found[: args.top]))
    print(f"\nthe first one has {cut(found[0])}\n\n{kept(reuse, disk)}")
    return 0


def _table(found: tuple[Candidate, ...]) -> str:
    best_ns = found[0].report.iteration_ns if found else 1
    sizes = ["rank", "DP", "TP", "CP", "EP", "PP", "segments", "B_i"]
    return format_table(
        [*sizes, "iteration", "/ best", "bubble", "exchange", "peak memory", "MFU"],
        [_row(place, one, best_ns) for place, one in enumerate(found, start=1)],
    )


def _row(place: int, one: Candidate, best_ns: int) -> list[str]:
    step, sizes = one.report, one.parallel
    ranks = len(step.busy_ns)
    return [
        str(place),
        *map(str, (sizes.data, sizes.tensor, sizes.context, sizes.expert, sizes.pipeline)),
        " ".join(str(module.segments) for module in one.partition.layout.modules),
        " ".join(map(str, one.partition.sub_microbatch.values())) or "-",
        milliseconds(step.iteration_ns),
        f"{step.iteration_ns / best_ns:.3f}",
        percent(sum(step.bubble_ns) / (ranks * step.pipeline_ns) if step.pipeline_ns else 0.0),
        milliseconds(max(step.exposed_exchange_ns)),
        size(max(step.peak_bytes)),
        percent(step.mfu),
    ]
