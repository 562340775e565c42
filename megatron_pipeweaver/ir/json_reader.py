"""Strict reading of JSON: every refusal names the file, the JSON path and the mend."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_pipeweaver.errors import ConfigError


def parse_json(data: bytes, source: str) -> JsonNode:
    """The root of the JSON text `data`, read from `source` (named in errors).

    Raises:
        ConfigError: not UTF-8, not JSON, or a key stands twice in one object.
    """
    try:
        value = json.loads(data, object_pairs_hook=_refuse_duplicate_keys)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not readable JSON ({error}); write the file again") from None
    return JsonNode(value, source, "$")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return result


class JsonNode:
    """A JSON value that knows where it stands; its readers return plain Python values."""

    __slots__ = ("_path", "_source", "_value")

    def __init__(self, value: Any, source: str, path: str) -> None:
        self._value = value
        self._source = source
        self._path = path

    def fail(self, problem: str) -> NoReturn:
        """Raise `ConfigError` about this value."""
        raise ConfigError(f"{self._source}: {self._path}: {problem}")

    def keys(self, required: frozenset[str], optional: frozenset[str] = frozenset()) -> JsonNode:
        """This node, known to be an object with all `required` and no unknown keys."""
        names = self._object().keys()
        if missing := required - names:
            self.fail(f"key {sorted(missing)[0]!r} is missing; add it")
        if unknown := names - required - optional:
            self.fail(f"unknown key {sorted(unknown)[0]!r}; remove it")
        return self

    def __getitem__(self, key: str) -> JsonNode:
        return JsonNode(self._object()[key], self._source, f"{self._path}.{key}")

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
        return [
            JsonNode(value, self._source, f"{self._path}[{index}]")
            for index, value in enumerate(self._value)
        ]

    def integer(self) -> int:
        """A whole number >= 0, below 2**63."""
        value = self._value
        if type(value) is not int:
            self._wrong_type("a whole number")
        if not 0 <= value < 2**63:
            self.fail(f"is {value}; it must be at least 0 and below 2**63")
        return int(value)

    def text(self) -> str:
        """A string."""
        if not isinstance(self._value, str):
            self._wrong_type("a string")
        return str(self._value)

    def boolean(self) -> bool:
        """``true`` or ``false``."""
        if not isinstance(self._value, bool):
            self._wrong_type("true or false")
        return bool(self._value)

    def _object(self) -> dict[str, Any]:
        if not isinstance(self._value, dict):
            self._wrong_type("an object")
        return self._value

    def _wrong_type(self, wanted: str) -> NoReturn:
        shown = json.dumps(self._value)
        self.fail(f"is {shown if len(shown) <= 40 else shown[:37] + '...'}; it must be {wanted}")


def read_bytes(path: Path) -> bytes:
    """The bytes of the file at `path`; `ConfigError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old file or the new one, never a part.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink()
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
