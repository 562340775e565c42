"""Plans of earlier iterations, found again by what they were made from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatron_pipeweaver.errors import ConfigError

_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKey:
    """What a plan depends on: the batch, evaluation or training, and the planner's settings."""

    batch_digest: str
    forward_only: bool
    settings_digest: str


class RecentCache(Generic[_V]):
    """Keeps the `size` values that were used last.

    Raises:
        ConfigError: `size` is negative.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ConfigError(f"plan cache: size is {size}; it must be >= 0")
        self._size = size
        self._values: OrderedDict[Hashable, _V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> _V | None:
        """The value under `key`, now the latest used; `None` where there is none."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: _V) -> None:
        """Keep `value`, and forget what was not used for longest."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)

    def values(self) -> tuple[_V, ...]:
        """All values, the latest used last."""
        return tuple(self._values.values())

    def drop(self, key: Hashable) -> None:
        """Forget `key`, if it is there."""
        self._values.pop(key, None)
