"""Frozen settings, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How long and how hard to search for a schedule.

    With one thread and a `max_rounds` the result depends on the problem and `seed` alone;
    `deterministic` asks that every stage runs its backwards in the order of microbatches and
    sub-microbatches, so that gradients accumulate in one order whatever the schedule.
    `split_weight_grad` lets the search run weight gradients as ops of their own.
    """

    time_budget_ns: int = SECOND_NS
    threads: int = 1
    seed: int = 0
    max_rounds: int | None = None
    deterministic: bool = False
    split_weight_grad: bool = True

    def __post_init__(self) -> None:
        if self.time_budget_ns < 0:
            raise ConfigError(f"search: time budget is {self.time_budget_ns} ns; need >= 0")
        if self.threads < 1:
            raise ConfigError(f"search: {self.threads} threads; need at least 1")
        if self.max_rounds is not None and self.max_rounds < 0:
            raise ConfigError(f"search: max_rounds is {self.max_rounds}; need >= 0")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"search: seed is {self.seed}; need 0 <= seed < 2**63")
