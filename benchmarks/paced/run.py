r"""PipeWeaver against Megatron's interleaved schedule function, in wall-clock time.

    python -m benchmarks.paced.run --setups vlm-s -o benchmarks/paced/results

Real gloo ranks run real actions, messages and autograd boundaries; each stage waits the time that
SEMU emulates for it on an H800, scaled by one factor per setup. See README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from fractions import Fraction
from pathlib import Path
from statistics import fmean

from benchmarks.paced.cases import SETUPS, PacedCase, describe, make_case
from benchmarks.paced.ranks import Measured, run_case
from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from tests.distributed.harness import run_on_ranks

_log = logging.getLogger("paced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--search-s", type=float, default=5.0, help="search time per batch")
    parser.add_argument("--op-ms", type=float, default=16.0, help="mean time of an op on a rank")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    for setup in args.setups:
        case = _case(setup, args)
        scale = _scale(case, args.op_ms)
        found: list[Measured] = run_on_ranks(
            run_case,
            case.pipeline_size,
            case,
            (scale.numerator, scale.denominator),
            args.repeats,
            deadline_s=600.0,
            environment={"TORCHDYNAMO_DISABLE": "1"},
        )[0]
        _write(args.output / f"{setup}.csv", found, scale)
        (args.output / f"{setup}.json").write_text(
            json.dumps({**describe(case), "scale": str(scale)}, indent=1) + "\n"
        )
        _log.info("%s", _summary(setup, found))


def _case(setup: str, args: argparse.Namespace) -> PacedCase:
    """The setup, planned both ways."""
    case = make_case(
        setup,
        batches=args.batches,
        microbatches=args.microbatches,
        seed=args.seed,
        search=SearchConfig(
            time_budget_ns=round(args.search_s * SECOND_NS),
            threads=2,
            seed=args.seed,
            # Splitting takes 8 % of a backward on CPUs; what it takes on an H800 nobody measured.
            # At 8 % plans of these setups hardly ever split.
            split_weight_grad=False,
        ),
    )
    for name, chosen in describe(case).items():
        _log.info("%s, %s: %s", setup, name, chosen)
    return case


def _scale(case: PacedCase, op_ms: float) -> Fraction:
    """Real over emulated time, so that PipeWeaver's ops last `op_ms` on average."""
    busy_ns = ops = 0
    for one in case.planned:
        for rank in one.plan.plan.ranks:
            ops += sum(hasattr(action, "op") for action in rank)
        busy_ns += case.pipeline_size * one.emulated_ns
    return Fraction(round(op_ms * 1000), round(busy_ns / ops / 1000))


def _write(path: Path, rows: list[Measured], scale: Fraction) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "batch", "repeat", "measured_ms", "emulated_ms", "h800_ms"])
        for one in rows:
            writer.writerow(
                [
                    one.system,
                    one.batch,
                    one.repeat,
                    f"{one.measured_ns / 1e6:.3f}",
                    f"{one.emulated_ns / 1e6:.3f}",
                    f"{one.measured_ns / scale / 1_000_000:.3f}",
                ]
            )


def _summary(setup: str, rows: list[Measured]) -> str:
    """Mean measured times, ratios to PipeWeaver's, accuracy against the emulated times."""
    systems = list(dict.fromkeys(one.system for one in rows))
    mean = {name: fmean(one.measured_ns for one in rows if one.system == name) for name in systems}
    accuracy = {
        name: min(
            1 - abs(one.measured_ns - one.emulated_ns) / one.emulated_ns
            for one in rows
            if one.system == name
        )
        for name in systems
    }
    return setup + "".join(
        f"; {name}: {mean[name] / 1e6:.0f} ms, {mean[name] / mean['pipeweaver']:.3f} x, at least "
        f"{accuracy[name]:.2%} of the emulated"
        for name in systems
    )


if __name__ == "__main__":
    main()
