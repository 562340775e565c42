"""``pipeweaver calibrate``: measure this machine's operators and write its device profile."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_pipeweaver.cli.files import refuse_bad_outputs
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.json_reader import write_whole
from megatron_pipeweaver.semu.calibration import Sample, calibrate
from megatron_pipeweaver.semu.collectives import measure_collectives, process_group, ranks_of_job
from megatron_pipeweaver.semu.devices import DeviceProfile, load_device, profile_to_json
from megatron_pipeweaver.semu.probes import measure, sizes_for
from megatron_pipeweaver.view.report import format_table
from megatron_pipeweaver.view.units import percent

HELP = "measure operators on this machine and write a device profile for emulation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="what to measure")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the profile to write"
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="profile (shipped name or file) whose data-sheet rates the factors refer to "
        "(default: cpu for the CPU; needed for cuda)",
    )
    parser.add_argument(
        "--sizes", type=_size, nargs="+", metavar="ROWSxWIDTH", help="operator sizes to measure"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="runs per operator (default 7)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, fit, write, print held-out errors; the exit code."""
    if args.repeats < 1:
        raise ConfigError(f"calibrate: {args.repeats} repeats; need at least 1")
    base = args.base or ("cpu" if args.device == "cpu" else None)
    if base is None:
        raise ConfigError("calibrate: --device cuda needs --base, a profile such as H100")
    profile = load_device(base)
    refuse_bad_outputs([args.output], inputs=[Path(base)] if Path(base).is_file() else [])
    sizes = sizes_for(args.device) if args.sizes is None else args.sizes
    if ranks_of_job() == 1:
        return _written(measure(args.device, sizes=sizes, repeats=args.repeats), profile, args)
    with process_group(args.device) as rank:
        samples = measure_collectives(args.device, repeats=args.repeats)
    if rank:
        return 0
    # The other ranks have ended, or do so now: operators are measured alone.
    return _written(
        measure(args.device, sizes=sizes, repeats=args.repeats) + samples, profile, args
    )


def _written(samples: list[Sample], profile: DeviceProfile, args: argparse.Namespace) -> int:
    """Fit, write the profile, print held-out errors; the exit code."""
    found = calibrate(samples, profile)
    write_whole(args.output, profile_to_json(found.profile))
    counts = {
        kind: sum(one.operator.kind is kind for one in samples) for kind in found.held_out_error
    }
    print(
        format_table(
            ["operator class", "samples", "held-out error"],
            [
                [kind.value, str(counts[kind]), percent(error)]
                for kind, error in found.held_out_error.items()
            ],
        )
    )
    print(f"\nwritten to {args.output}")
    return 0


def _size(text: str) -> tuple[int, int]:
    rows, _, width = text.partition("x")
    try:
        found = int(rows), int(width)
    except ValueError:
        found = (0, 0)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; write two numbers as 256x512")
    return found
