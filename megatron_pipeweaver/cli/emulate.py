"""``pipeweaver emulate``: what a training step of a job takes, by emulation."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_pipeweaver.cli.job_files import load_job
from megatron_pipeweaver.cli.search_flags import add_search_arguments, search_config
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import layers_text
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.partition.balance import Balance, Probes
from megatron_pipeweaver.partition.tune import Candidate, Job, Scheduler, evaluate
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.brief import brief_searches
from megatron_pipeweaver.semu.reuse import DiskCache, Reuse
from megatron_pipeweaver.view.report import format_table
from megatron_pipeweaver.view.units import milliseconds, percent, size

HELP = "emulate a training step of a job file: time, communication, memory and MFU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("job", type=Path, help="a pipeweaver.job/1 file")
    add_cache_argument(parser)
    add_balance_argument(parser)
    add_search_arguments(parser)


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the file that keeps emulated subgraphs."""
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep emulated subgraphs in FILE, and take those of earlier runs from it",
    )


def add_balance_argument(parser: argparse.ArgumentParser) -> None:
    """Declare whether the cut is searched."""
    parser.add_argument(
        "--balance",
        action="store_true",
        help="search segments and layers per stage, by the schedules of expected batches",
    )


def balance_probes(args: argparse.Namespace, config: SearchConfig) -> Probes | None:
    """The brief searches that ``--balance`` asks for."""
    return brief_searches(config) if args.balance else None


def run(args: argparse.Namespace) -> int:
    """Cut, schedule, emulate, print; the exit code."""
    config = search_config(args)
    file = load_job(args.job)
    reuse, disk = Reuse(), None if args.cache is None else DiskCache(args.cache)
    found = evaluate(
        file.job,
        file.parallel,
        searched(config),
        reuse=reuse,
        disk=disk,
        balance=balance_probes(args, config),
    )
    print(f"{heading(file.job, file.parallel.world_size)}: {sizes(found.parallel)}")
    print(f"{cut(found)}\n")
    print(f"{_totals(found)}\n\n{_times(found)}\n\n{_memory(found, file.job)}")
    print(f"\n{kept(reuse, disk)}")
    return 0


def kept(reuse: Reuse, disk: DiskCache | None) -> str:
    """How often emulation was spared, after what is new has been written to `disk`."""
    asked = reuse.hits + reuse.misses
    lines = [f"reuse: {reuse.hits} of {asked} requests ({percent(reuse.hit_rate)})"]
    if disk is not None:
        disk.save()
        lines.append(
            f"cache: {disk.hits} of {disk.hits + disk.misses} subgraphs found in {disk.path}"
        )
    return "\n".join(lines)


def searched(config: SearchConfig) -> Scheduler:
    """A scheduler that searches by `config` and checks what it found."""

    def schedule(problem: Problem) -> Schedule:
        found = solve(problem, config).schedule
        check_schedule(problem, found)
        return found

    return schedule


def heading(job: Job, ranks: int) -> str:
    """``vlm-m on 64 H800, 64 microbatches``."""
    return (
        f"{job.model.name} on {ranks} {job.device.spec.name}, {len(job.microbatches)} microbatches"
    )


def sizes(parallel: ParallelSizes) -> str:
    """``DP 8, TP 2, PP 4``, and CP and EP where they are not 1."""
    named = {"DP": parallel.data, "TP": parallel.tensor, "PP": parallel.pipeline}
    rare = {"CP": parallel.context, "EP": parallel.expert}
    shown = named | {name: count for name, count in rare.items() if count > 1}
    return ", ".join(f"{name} {count}" for name, count in shown.items())


def cut(found: Candidate) -> str:
    """Segments by module, sub-microbatch sizes by encoder, and what searching the cut brought."""
    segments = ", ".join(f"{one.module} {one.segments}" for one in found.partition.layout.modules)
    items = ", ".join(f"{name} {count}" for name, count in found.partition.sub_microbatch.items())
    text = f"segments: {segments}; largest sub-microbatch: {items or 'no items'}"
    if found.balance is None:
        return text
    layers = layers_text(found.partition.layout)
    return f"{text}\nlayers per stage: {layers}; {brought(found.balance)}"


def brought(balance: Balance) -> str:
    """By how much a cut that was searched shortens batches that the search had not seen."""
    if not balance.gain:
        return "the paper's cut, none was clearly better"
    return f"searched, {percent(balance.gain)} shorter iterations than the paper's cut"


def _totals(found: Candidate) -> str:
    step = found.report
    return "\n".join(
        [
            f"iteration     {milliseconds(step.iteration_ns)} ({step.iteration_ns} ns)",
            f"pipeline      {milliseconds(step.pipeline_ns)}",
            f"peak memory   {size(max(step.peak_bytes))}",
            f"MFU           {percent(step.mfu)}",
        ]
    )


def _times(found: Candidate) -> str:
    """By rank; what the tensor-parallel peers wait for is a part of busy."""
    step = found.report
    return format_table(
        ["rank", "busy", "bubble", "exposed in stages", "exchange", "not hidden", "optimizer"],
        [
            [str(rank), *map(milliseconds, times)]
            for rank, times in enumerate(
                zip(
                    step.busy_ns,
                    step.bubble_ns,
                    step.exposed_ns,
                    step.gradient_exchange_ns,
                    step.exposed_exchange_ns,
                    step.optimizer_ns,
                    strict=True,
                )
            )
        ],
    )


def _memory(found: Candidate, job: Job) -> str:
    step = found.report
    return format_table(
        ["rank", "weights", "gradients", "optimizer", "activations", "peak", "of"],
        [
            [
                str(rank),
                size(state.weight_bytes),
                size(state.gradient_bytes),
                size(state.optimizer_bytes),
                size(peak - state.total_bytes),
                size(peak),
                size(job.device.spec.memory_bytes),
            ]
            for rank, (state, peak) in enumerate(zip(step.states, step.peak_bytes, strict=True))
        ],
    )
