"""The flags of every verb that searches, and the `SearchConfig` they make."""

from __future__ import annotations

import argparse
import math

from megatron_pipeweaver.config import SECOND_NS, Exploration, MemorySolver, SearchConfig


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare time budget, threads, seed and what the search may do."""
    parser.add_argument(
        "--time-budget",
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="how long to search (default 1)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="search threads (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    parser.add_argument(
        "--max-rounds",
        type=int,
        metavar="N",
        help="end after so many rounds; with one thread the result then depends on the seed alone",
    )
    parser.add_argument(
        "--no-split",
        action="store_true",
        help="never run a weight gradient apart from its backward",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="every stage runs its backwards in the order of microbatches",
    )
    parser.add_argument(
        "--memory-solver",
        type=MemorySolver,
        choices=list(MemorySolver),
        default=MemorySolver.NATIVE,
        help="who chooses strategies for the final orders (default native; highs needs highspy)",
    )
    ablation = parser.add_argument_group("parts of the search, to switch off for comparison")
    ablation.add_argument(
        "--exploration",
        type=Exploration,
        choices=list(Exploration),
        default=Exploration.FULL,
        help="how orders are found (default full; mcts is the paper's, dfs and random are plain)",
    )
    ablation.add_argument(
        "--no-memory-choice",
        action="store_true",
        help="keep the strategies that an order was found with",
    )
    ablation.add_argument(
        "--no-alternate",
        action="store_true",
        help="mcts, dfs, random: no turns of forwards and backwards, only priorities",
    )
    ablation.add_argument(
        "--no-groups",
        action="store_true",
        help="mcts, dfs, random: every segment has a priority of its own",
    )


def search_config(args: argparse.Namespace) -> SearchConfig:
    """The settings that `args` ask for; `ConfigError` where they make no sense."""
    return SearchConfig(
        time_budget_ns=round(args.time_budget * SECOND_NS),
        threads=args.threads,
        seed=args.seed,
        max_rounds=args.max_rounds,
        deterministic=args.deterministic,
        split_weight_grad=not args.no_split,
        memory_solver=args.memory_solver,
        exploration=args.exploration,
        choose_memory=not args.no_memory_choice,
        alternate=not args.no_alternate,
        group_segments=not args.no_groups,
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"is {text!r}; give seconds from 0 to 1000000")
    return seconds
