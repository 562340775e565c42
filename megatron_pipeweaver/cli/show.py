"""``pipeweaver show``: a schedule or a trace as a picture, as a Chrome trace, or as text."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_pipeweaver.cli.files import (
    load_problem,
    load_schedule,
    load_schedule_or_trace,
    refuse_bad_outputs,
)
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.json_reader import write_whole
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.ir.text import format_ops
from megatron_pipeweaver.ir.trace import Trace
from megatron_pipeweaver.view.chrome import chrome_of_schedule, chrome_of_trace
from megatron_pipeweaver.view.layout import Drawing, draw_schedule, draw_trace, schedule_of_trace
from megatron_pipeweaver.view.report import planned_against_measured, schedule_facts
from megatron_pipeweaver.view.svg import render_svg

HELP = "draw or print a schedule or trace file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "file", type=Path, help="a pipeweaver.schedule/1 or pipeweaver.trace/1 file"
    )
    parser.add_argument(
        "--problem", type=Path, metavar="FILE", help="its problem file: adds memory curves"
    )
    parser.add_argument(
        "--planned", type=Path, metavar="FILE", help="with a trace: the schedule to hold it against"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="SVG", help="write the timeline here")
    parser.add_argument("--chrome", type=Path, metavar="JSON", help="write a Chrome trace here")
    parser.add_argument("--text", action="store_true", help="print figures and the order of ops")
    parser.add_argument("--title", help="title of the timeline (default: the file's name)")


def run(args: argparse.Namespace) -> int:
    """Write or print what was asked for; the exit code."""
    if not (args.output or args.chrome or args.text or args.planned):
        raise ConfigError("nothing to show; add -o FILE.svg, --chrome FILE.json or --text")
    inputs = [args.file, args.problem, args.planned]
    refuse_bad_outputs([args.output, args.chrome], inputs=inputs)
    shown = load_schedule_or_trace(args.file)
    problem = _problem_of(shown, args)
    if args.output is not None:
        write_whole(args.output, render_svg(_draw(shown, problem, args.title or args.file.stem)))
    if args.chrome is not None:
        chrome = (
            chrome_of_schedule(shown, problem)
            if isinstance(shown, Schedule)
            else chrome_of_trace(shown, problem)
        )
        write_whole(args.chrome, chrome)
    if args.planned is not None:
        if isinstance(shown, Schedule):
            raise ConfigError(f"{args.file}: is a schedule; --planned goes with a trace file")
        print(planned_against_measured(load_schedule(args.planned), shown))
    if args.text:
        _print(shown, problem)
    return 0


def _problem_of(shown: Schedule | Trace, args: argparse.Namespace) -> Problem | None:
    if args.problem is None:
        return None
    problem, sha256 = load_problem(args.problem)
    if isinstance(shown, Schedule) and shown.problem_sha256 not in ("", sha256):
        raise ConfigError(
            f"{args.file}: $.problem_sha256: is not that of {args.problem} ({sha256}); "
            "give the problem that was solved"
        )
    return problem


def _draw(shown: Schedule | Trace, problem: Problem | None, title: str) -> Drawing:
    if isinstance(shown, Schedule):
        return draw_schedule(shown, problem, title=title)
    return draw_trace(shown, problem, title=title)


def _print(shown: Schedule | Trace, problem: Problem | None) -> None:
    schedule = shown if isinstance(shown, Schedule) else schedule_of_trace(shown)
    print(schedule_facts(schedule, problem))
    print(f"\n{format_ops([[op.key for op in rank] for rank in schedule.ranks])}")
