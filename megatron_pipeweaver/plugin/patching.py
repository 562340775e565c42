"""Replacing attributes from outside, and putting them back exactly as they were.

Only the mechanism: what is replaced, and when, is decided in `plugin.install`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Patch:
    """`value` in the place of attribute `name` of `target` (a module, a class or an object).

    `may_be_absent` where some versions of `target` lack the attribute.
    """

    target: object
    name: str
    value: object
    may_be_absent: bool = False


class PatchSet:
    """Patches that are applied and undone together; also a context manager.

    Args:
        patches: applied in this order, undone in reverse.
    """

    def __init__(self, patches: Iterable[Patch]) -> None:
        self._patches = tuple(patches)
        self._undo: list[tuple[Patch, object]] = []

    @property
    def applied(self) -> bool:
        """Whether the patches are in place now."""
        return bool(self._undo)

    def apply(self) -> None:
        """Put every value in place; does nothing where they are in place already.

        Raises:
            AttributeError: a target has no such attribute (then none of the patches stays).
        """
        if self.applied:
            return
        try:
            for patch in self._patches:
                if not patch.may_be_absent:
                    getattr(patch.target, patch.name)
                # What the target merely inherits must be deleted again, not set on it.
                own = getattr(patch.target, "__dict__", {}).get(patch.name, _ABSENT)
                setattr(patch.target, patch.name, patch.value)
                self._undo.append((patch, own))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put every original back, last first; does nothing where nothing is in place."""
        while self._undo:
            patch, own = self._undo.pop()
            if own is _ABSENT:
                delattr(patch.target, patch.name)
            else:
                setattr(patch.target, patch.name, own)

    def __enter__(self) -> PatchSet:
        self.apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()
