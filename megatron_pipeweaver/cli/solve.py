"""``pipeweaver solve``: a problem file in, the best schedule found within the time budget out."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from megatron_pipeweaver.cli.files import load_problem, refuse_bad_outputs
from megatron_pipeweaver.cli.interrupt import until_interrupted
from megatron_pipeweaver.cli.search_flags import add_search_arguments, search_config
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.ir.codec import schedule_to_json
from megatron_pipeweaver.ir.json_reader import write_whole
from megatron_pipeweaver.search.anytime import Improvement, SearchResult, solve
from megatron_pipeweaver.view.layout import draw_schedule
from megatron_pipeweaver.view.report import format_table, schedule_facts
from megatron_pipeweaver.view.svg import render_svg
from megatron_pipeweaver.view.units import milliseconds

_log = logging.getLogger(__name__)

HELP = "search for a schedule of a problem file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("problem", type=Path, help="a pipeweaver.problem/1 file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="where to put the schedule"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw its timeline here as well")
    add_search_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Search, check, write, report; the exit code."""
    config = search_config(args)
    refuse_bad_outputs([args.output, args.svg], inputs=[args.problem])
    problem, sha256 = load_problem(args.problem)
    result = until_interrupted(
        lambda stop: solve(problem, config, problem_sha256=sha256, on_improvement=_tell, stop=stop)
    )
    check_schedule(problem, result.schedule, problem_sha256=sha256)
    write_whole(args.output, schedule_to_json(result.schedule))
    if args.svg is not None:
        drawing = draw_schedule(result.schedule, problem, title=args.problem.stem)
        write_whole(args.svg, render_svg(drawing))
    print(schedule_facts(result.schedule, problem))
    print(f"\n{_baselines(result)}")
    print(
        f"first schedule after {milliseconds(result.first_ns)}, {result.evaluations} evaluated "
        f"in {milliseconds(result.elapsed_ns)}; found in round {result.rounds} of thread "
        f"{result.thread} (seed {result.seed}); written to {args.output}"
    )
    return 0


def _tell(better: Improvement) -> None:
    _log.info(
        "%s after %s, %d evaluated",
        milliseconds(better.makespan_ns),
        milliseconds(better.elapsed_ns),
        better.evaluations,
    )


def _baselines(result: SearchResult) -> str:
    """What was found beside the static schedules, and under it every proven bound."""
    found_ns, bound_ns = result.schedule.makespan_ns, max(result.bounds.values(), default=0)
    table = format_table(
        ["schedule", "makespan", "/ bound", "/ pipeweaver"],
        [
            [
                name.replace("_", " "),
                milliseconds(time_ns),
                f"{time_ns / bound_ns:.4f}" if bound_ns else "-",
                f"{time_ns / found_ns:.4f}" if found_ns else "-",
            ]
            for name, time_ns in {"pipeweaver": found_ns, **result.baselines}.items()
        ],
    )
    bounds = ", ".join(
        f"{name.replace('_', ' ')} {milliseconds(time_ns)}"
        for name, time_ns in result.bounds.items()
    )
    return f"{table}\n\nproven bounds: {bounds}"
