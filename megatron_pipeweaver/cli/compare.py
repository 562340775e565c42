"""``pipeweaver compare``: the searched schedule beside the static ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_pipeweaver.cli.files import load_problem
from megatron_pipeweaver.cli.interrupt import until_interrupted
from megatron_pipeweaver.cli.search_flags import add_search_arguments, search_config
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.baselines import BASELINES, schedule
from megatron_pipeweaver.search.contiguous import contiguous
from megatron_pipeweaver.view.report import ScheduleRow, comparison_table

HELP = "compare the searched schedule of a problem file with the static ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("problem", type=Path, help="a pipeweaver.problem/1 file")
    add_search_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Build, check and print all of them; the exit code."""
    config = search_config(args)
    problem, _ = load_problem(args.problem)
    found = until_interrupted(lambda stop: solve(problem, config, stop=stop))
    schedules = {"pipeweaver": found.schedule}
    for name in BASELINES:
        static = schedule(problem, name, in_order=config.deterministic)
        schedules[name.replace("_", " ")] = static
    for one in schedules.values():
        check_schedule(problem, one)
    recut = contiguous(problem)
    schedules["contiguous 1F1B"] = schedule(recut, "one_f_one_b")
    check_schedule(recut, schedules["contiguous 1F1B"])
    print(
        comparison_table(
            [ScheduleRow.of(name, one) for name, one in schedules.items()],
            lower_bound_ns=schedules["pipeweaver"].lower_bound_ns,
        )
    )
    return 0
