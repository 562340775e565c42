"""Spatial-temporal subgraph reuse: what was emulated once is not emulated again (paper, v1).

Equal layers of a stage, equal stages of a module, equal passes of microbatches, and equal
iterations all ask for the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

_V = TypeVar("_V")


class Reuse:
    """Results by the content that they follow from, with hit counts.

    A disabled one recomputes everything; results are the same.
    """

    __slots__ = ("_contexts", "_enabled", "_found", "hits", "misses")

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._contexts: list[object] = []
        self._found: dict[Hashable, object] = {}
        self.hits = 0
        self.misses = 0

    def context(self, settings: object) -> int:
        """A small key for `settings`, the same for equal ones; it stands first in other keys."""
        if settings not in self._contexts:
            self._contexts.append(settings)
        return self._contexts.index(settings)

    def get(self, key: Hashable, make: Callable[[], _V]) -> _V:
        """What `make` returns for `key`, made once; keys of different kinds must differ."""
        if not self._enabled:
            self.misses += 1
            return make()
        if key in self._found:
            self.hits += 1
            return cast(_V, self._found[key])
        self.misses += 1
        value = make()
        self._found[key] = value
        return value

    @property
    def hit_rate(self) -> float:
        """Share of requests that needed no emulation, between 0 and 1."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0
