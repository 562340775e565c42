"""``pipeweaver verify``: hold a schedule file against its problem file."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_pipeweaver.cli.files import load_problem, load_schedule
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.native import NativeProblem
from megatron_pipeweaver.view.report import schedule_facts
from megatron_pipeweaver.view.units import milliseconds

HELP = "check a schedule file against its problem file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("problem", type=Path, help="a pipeweaver.problem/1 file")
    parser.add_argument("schedule", type=Path, help="a pipeweaver.schedule/1 file")


def run(args: argparse.Namespace) -> int:
    """Check every rule of the format; the exit code (`PlanInvalidError` says which is broken)."""
    problem, sha256 = load_problem(args.problem)
    schedule = load_schedule(args.schedule)
    check_schedule(problem, schedule, problem_sha256=sha256)
    print(f"OK: {args.schedule} is a valid schedule of {args.problem}")
    print(schedule_facts(schedule, problem))
    proven_ns = max(lower_bounds(NativeProblem(problem).core).values())
    if proven_ns < schedule.lower_bound_ns:
        print(
            f"the lower bound is the file's claim; proven here: {milliseconds(proven_ns)} "
            f"({proven_ns} ns)"
        )
    return 0
