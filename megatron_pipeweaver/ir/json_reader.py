"""Strict reading of JSON: every refusal names the file, the JSON path and the mend."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from megatron_pipeweaver.errors import ConfigError

_P = ParamSpec("_P")
_T = TypeVar("_T")
_LIMIT = 2**63  # whole numbers fit the native core's signed 64 bits


def parse_json(data: bytes, source: str) -> JsonNode:
    """The root of the JSON text `data`, read from `source` (named in errors).

    Raises:
        ConfigError: not UTF-8, not JSON, or a key stands twice in one object.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_refuse_bad_keys)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not readable JSON ({error}); write the file again") from None
    return JsonNode(value, None, source)


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number of at least 0 that fits 64 bits; ``true`` is none."""
    return type(value) is int and 0 <= value < _LIMIT


def _refuse_bad_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    for name in result:
        name.encode()  # a lone surrogate, written as an escape, is no text: it cannot be printed
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return result


class JsonNode:
    """A JSON value that knows where it stands; its readers return plain Python values.

    A value stands under `key` in `parent`; the root has no parent, and its key is the source. The
    path is put together only where it is told.
    """

    __slots__ = ("_key", "_parent", "_value")

    def __init__(self, value: Any, parent: JsonNode | None, key: str | int) -> None:
        self._value = value
        self._parent = parent
        self._key = key

    @property
    def plain(self) -> Any:
        """The unchecked value, for readers of long lists that come back here if it is amiss."""
        return self._value

    def fail(self, problem: str) -> NoReturn:
        """Raise `ConfigError` about this value."""
        steps = []
        node = self
        while node._parent is not None:
            steps.append(_step(node._key))
            node = node._parent
        raise ConfigError(f"{node._key}: ${''.join(reversed(steps))}: {problem}")

    def keys(self, required: frozenset[str], optional: frozenset[str] = frozenset()) -> JsonNode:
        """This node, known to be an object with all `required` and no unknown keys."""
        names = self._object().keys()
        if missing := required - names:
            self.fail(f"key {sorted(missing)[0]!r} is missing; add it")
        if unknown := names - required - optional:
            self.fail(f"unknown key {sorted(unknown)[0]!r}; remove it")
        return self

    def __getitem__(self, key: str) -> JsonNode:
        return JsonNode(self._object()[key], self, key)

    def get(self, key: str) -> JsonNode | None:
        """The value under `key`, or `None` where the object has no such key."""
        return self[key] if key in self._object() else None

    def entries(self) -> Iterator[tuple[str, JsonNode]]:
        """Key and value of every entry of an object, in file order."""
        for key in self._object():
            yield key, self[key]

    def array(self, length: int | None = None) -> list[JsonNode]:
        """The elements of an array, of `length` elements where that is given."""
        if not isinstance(self._value, list):
            self._wrong_type("an array")
        if length is not None and len(self._value) != length:
            self.fail(f"has {len(self._value)} entries; it must have {length}")
        return [JsonNode(value, self, index) for index, value in enumerate(self._value)]

    def integer(self, minimum: int = 0) -> int:
        """A whole number of at least `minimum`, below 2**63."""
        value = self._value
        if type(value) is not int:
            self._wrong_type("a whole number")
        if not minimum <= value < _LIMIT:
            self.fail(f"is {_shown(value)}; it must be at least {minimum} and below 2**63")
        return int(value)

    def number(self) -> float:
        """A whole number or a finite fraction; for settings, never for what is computed with."""
        value = self._value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong_type("a number")
        if not math.isfinite(value):
            self.fail(f"is {_shown(value)}; it must be finite")
        return float(value)

    def text(self) -> str:
        """A string of Unicode characters."""
        if not isinstance(self._value, str):
            self._wrong_type("a string")
        try:
            self._value.encode()
        except UnicodeEncodeError:
            self.fail(f"is {_shown(self._value)}, half of a surrogate pair; write whole characters")
        return str(self._value)

    def boolean(self) -> bool:
        """``true`` or ``false``."""
        if not isinstance(self._value, bool):
            self._wrong_type("true or false")
        return bool(self._value)

    def build(self, make: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `make` makes of values read from this node; its refusal is told as this node's."""
        try:
            return make(*args, **kwargs)
        except ConfigError as error:
            self.fail(str(error))

    def _object(self) -> dict[str, Any]:
        if not isinstance(self._value, dict):
            self._wrong_type("an object")
        return self._value

    def _wrong_type(self, wanted: str) -> NoReturn:
        self.fail(f"is {_shown(self._value)}; it must be {wanted}")


def _step(key: str | int) -> str:
    """One step of a path; a key that is no plain word (and might hold a line break) is quoted."""
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if key.isidentifier() else f"[{json.dumps(key)}]"


def _shown(value: Any) -> str:
    """`value` in at most 40 characters of one line."""
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def read_bytes(path: Path) -> bytes:
    """The bytes of the file at `path`; `ConfigError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old file or the new one, never a part.

    Missing folders are made. A symbolic link stays one; a device or a pipe is written into.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():  # /dev/stdout must not be replaced by a file
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another") from None


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:  # an interrupt, too, must not leave the half-written file behind
        Path(temporary).unlink(missing_ok=True)
        raise
