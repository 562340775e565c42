"""Random problems, each solved in several ways and every schedule verified.

    python -m benchmarks.search.fuzz --problems 20000

Run from the repository root. Prints how many problems were tried; ends with an error at the first
schedule that the plain-Python verifier refuses. A solve that takes longer than a minute dumps all
stacks and ends the run.
"""

from __future__ import annotations

import argparse
import faulthandler

from hypothesis import HealthCheck, Phase, given, settings

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import Exploration, SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.anytime import solve
from tests.property.problems import problems

WAYS = (
    SearchConfig(max_rounds=25),
    SearchConfig(max_rounds=15, split_weight_grad=False),
    SearchConfig(max_rounds=15, deterministic=True),
    SearchConfig(max_rounds=12, exploration=Exploration.MCTS, threads=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--microbatches", type=int, default=4)
    args = parser.parse_args()
    tried = []

    @settings(
        max_examples=args.problems,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(problems(most_microbatches=args.microbatches))
    def one(problem: Problem) -> None:
        faulthandler.dump_traceback_later(60, exit=True)
        for config in WAYS:
            try:
                result = solve(problem, config)
            except ConfigError:
                assert config.deterministic
                continue
            check_schedule(problem, result.schedule)
        tried.append(problem.pipeline_size)

    one()
    faulthandler.cancel_dump_traceback_later()
    print(f"{len(tried)} problems, {len(WAYS)} ways each: all schedules valid")


if __name__ == "__main__":
    main()
