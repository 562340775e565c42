r"""What the executor takes per action when stages and transport do nothing.

    python -m benchmarks.runtime.overhead -o benchmarks/runtime/results/overhead.csv

One process runs the action list of every rank of real plans (the paper's setups, dynamic batches)
over stages that return a ready tensor and a transport whose messages are there at once; so all
that is measured is the executor, its recorder, and what it prepares per plan.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.paced.cases import SETUPS, TINY, make_case
from megatron_pipeweaver.compiler.packed import PackedPlan, read_plan
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.plan import Message, Plan, PlanPass, VerifiedPlan
from megatron_pipeweaver.ir.plan_codec import plan_from_json, plan_to_json
from megatron_pipeweaver.ir.problem import OpKey
from megatron_pipeweaver.runtime.executor import Executor
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.transfer import Pending

_log = logging.getLogger("overhead")


class _Ready:
    """A message that went through before anyone asked."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class NoTransport:
    """A `Transport` without a wire."""

    def __init__(self) -> None:
        self._ready = _Ready(torch.zeros(TINY, dtype=torch.float64))

    def isend(self, messages: Sequence[Message], tensors: Sequence[Tensor]) -> Sequence[Pending]:
        """Nothing to send."""
        return [self._ready] * len(messages)

    def irecv(self, messages: Sequence[Message]) -> Sequence[Pending]:
        """There already."""
        return [self._ready] * len(messages)

    def finish(self) -> None:
        """Nothing is under way."""


class NoStages:
    """A `StageRunner` that computes nothing."""

    def __init__(self) -> None:
        self._tensor = torch.zeros(TINY, dtype=torch.float64)

    def forward(
        self, one: PlanPass, op: OpKey, strategy: str, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """A ready tensor."""
        return self._tensor

    def backward(
        self, one: PlanPass, op: OpKey, strategy: str, output_grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """One gradient per input."""
        if op.stage:
            return (self._tensor,)
        return (self._tensor,) * len(one.after)

    def weight_grad(self, one: PlanPass, op: OpKey) -> None:
        """Nothing left to do."""


def action_ns(verified: VerifiedPlan, repeats: int) -> Sequence[float]:
    """Nanoseconds per action, over all ranks' lists, for each of `repeats` runs."""
    plan = verified.plan
    count = sum(map(len, plan.ranks))
    found = []
    for _ in range(repeats):
        started_ns = time.perf_counter_ns()
        for rank in range(plan.pipeline_size):
            Executor(rank, NoStages(), NoTransport(), Recorder(0)).run(verified)
        found.append((time.perf_counter_ns() - started_ns) / count)
    return found


def verify_ns(
    verified: VerifiedPlan, repeats: int, reader: Callable[[bytes], Plan | PackedPlan]
) -> tuple[float, float]:
    """Nanoseconds to read a plan's bytes, and to verify it: each rank does so with every plan."""
    data = plan_to_json(verified.plan)
    read, proven = [], []
    for _ in range(repeats):
        started_ns = time.perf_counter_ns()
        plan = reader(data)
        read_ns = time.perf_counter_ns()
        verify(plan)
        proven.append(time.perf_counter_ns() - read_ns)
        read.append(read_ns - started_ns)
    return median(read), median(proven)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows = []
    for setup in args.setups:
        case = make_case(
            setup,
            batches=1,
            microbatches=32,
            seed=0,
            search=SearchConfig(max_rounds=1, split_weight_grad=False),
        )
        verified = case.planned[0].plan
        times = action_ns(verified, args.repeats)
        repeats = max(1, args.repeats // 3)
        read, proven = verify_ns(verified, repeats, read_plan)
        by_python = verify_ns(verified, repeats, plan_from_json)
        rows.append(
            {
                "setup": setup,
                "actions": sum(map(len, verified.plan.ranks)),
                "action_us_median": f"{median(times) / 1e3:.2f}",
                "action_us_most": f"{max(times) / 1e3:.2f}",
                "read_ms": f"{read / 1e6:.2f}",
                "verify_ms": f"{proven / 1e6:.2f}",
                "python_read_ms": f"{by_python[0] / 1e6:.1f}",
                "python_verify_ms": f"{by_python[1] / 1e6:.1f}",
            }
        )
        _log.info("%s", rows[-1])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
