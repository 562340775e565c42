"""Frozen settings, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_pipeweaver.errors import ConfigError

SECOND_NS = 1_000_000_000


class Exploration(StrEnum):
    """How the search walks through orders."""

    FULL = "full"
    """Recipes, then annealing: the default and the strongest."""
    MCTS = "mcts"
    """The paper's tree search over segment priorities (section 4.1)."""
    DFS = "dfs"
    """Sequences of segments in lexicographic order, for comparison."""
    RANDOM = "random"
    """Random sequences of segments, for comparison."""


class MemorySolver(StrEnum):
    """Who chooses the strategies of the schedule that is returned (paper section 4.3)."""

    NATIVE = "native"
    """Greedy, prices and exchanges, within the search."""
    HIGHS = "highs"
    """HiGHS once more behind the search, in a tenth of its time; needs the package highspy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How long and how hard to search for a schedule.

    With one thread and a `max_rounds` the result depends on the problem and `seed` alone;
    `deterministic` asks that every stage runs its backwards in the order of microbatches and
    sub-microbatches, so that gradients accumulate in one order whatever the schedule.
    `split_weight_grad` lets the search run weight gradients as ops of their own; `choose_memory`
    lets it choose each stage pair's strategy for the order found (paper section 4.3), else pairs
    keep what they were scheduled with, for MCTS the leanest. `tree_alpha` and `tree_beta` are the
    paper's alpha and beta, for MCTS. `alternate` runs forwards and backwards by turns where both
    could start (section 4.2), `group_segments` gives a module's segments within a microbatch one
    priority (section 4.1); both are for MCTS, DFS and random exploration.
    """

    time_budget_ns: int = SECOND_NS
    threads: int = 1
    seed: int = 0
    max_rounds: int | None = None
    deterministic: bool = False
    split_weight_grad: bool = True
    choose_memory: bool = True
    memory_solver: MemorySolver = MemorySolver.NATIVE
    exploration: Exploration = Exploration.FULL
    tree_alpha: float = 2.0
    tree_beta: float = 0.05
    alternate: bool = True
    group_segments: bool = True

    def __post_init__(self) -> None:
        if self.time_budget_ns < 0:
            raise ConfigError(f"search: time budget is {self.time_budget_ns} ns; need >= 0")
        if self.threads < 1:
            raise ConfigError(f"search: {self.threads} threads; need at least 1")
        if self.max_rounds is not None and self.max_rounds < 0:
            raise ConfigError(f"search: max_rounds is {self.max_rounds}; need >= 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"search: seed is {self.seed}; need 0 <= seed < 2**63")
