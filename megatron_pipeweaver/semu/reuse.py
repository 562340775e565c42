"""Spatial-temporal subgraph reuse: what was emulated once is not emulated again (paper, v1).

Equal layers of a stage, equal stages of a module, equal passes of microbatches and equal
iterations ask for the same keys (`Reuse`); further runs find stage pairs on disk (`DiskCache`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar, cast

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import check_format, to_bytes
from megatron_pipeweaver.ir.json_reader import parse_json

CACHE_FORMAT = "pipeweaver.semu_cache/2"
_V = TypeVar("_V")
_log = logging.getLogger(__name__)


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


def content_key(*parts: object) -> str:
    """A digest of values by their printed form; frozen dataclasses print all of their fields."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def source_digest() -> str:
    """A digest of the emulator's own source files: another emulator's results are not reused."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class DiskCache:
    """Emulated subgraphs as rows of integers in one file, found by content and shared by runs.

    Every write replaces the file as a whole by a renamed one that holds a digest of its content,
    so readers never see half of it. Writers take turns by a lock on a file beside it and add to
    what they find, so none of several at once loses entries. A file that does not read back is
    left out with a warning, and written anew.

    Args:
        path: the file; it need not exist yet.

    Raises:
        ConfigError: `path` is a folder.
    """

    __slots__ = ("_entries", "_fresh", "hits", "misses", "path")

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise ConfigError(f"cost cache {path} is a folder; name a file")
        self.path = path
        self._entries = _read_entries(path)
        self._fresh: dict[str, tuple[int, ...]] = {}
        self.hits = 0
        self.misses = 0

    def get(self, key: str, make: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The row under `key`, from the file or from `make`."""
        found = self._entries.get(key)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        value = make()
        self._entries[key] = self._fresh[key] = value
        return value

    def save(self) -> None:
        """Add what is new to the file; what others have added meanwhile stays.

        Raises:
            ConfigError: the file or its folder cannot be written.
        """
        if not self._fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _writing(self.path):
                entries = {**_read_entries(self.path), **self._fresh}
                _replace_file(self.path, _entries_to_json(entries))
        except OSError as error:
            raise ConfigError(
                f"cost cache {self.path} cannot be written ({error}); name another file"
            ) from error
        self._fresh.clear()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Keep other writers of `path` out; the lock ends with its process, however that ends."""
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entries_to_json(entries: Mapping[str, tuple[int, ...]]) -> bytes:
    rows = [[key, list(numbers)] for key, numbers in sorted(entries.items())]
    return to_bytes(
        {
            "format": CACHE_FORMAT,
            "sha256": hashlib.sha256(to_bytes(rows)).hexdigest(),
            "entries": rows,
        }
    )


def _read_entries(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        _log.warning("cost cache %s cannot be read (%s); emulating anew", path, error)
        return {}
    try:
        return _parse_entries(data, str(path))
    except ConfigError as error:
        _log.warning("cost cache is damaged and left out: %s", error)
        return {}


def _parse_entries(data: bytes, source: str) -> dict[str, tuple[int, ...]]:
    root = check_format(parse_json(data, source), CACHE_FORMAT, {"sha256", "entries"})
    entries = {
        key.text(): tuple(number.integer() for number in numbers.array())
        for key, numbers in (entry.array(2) for entry in root["entries"].array())
    }
    # The digest is that of the canonical form, so a changed digit does not pass as a number.
    if _entries_to_json(entries) != data:
        root["sha256"].fail("does not fit the entries; the file was changed or cut")
    return entries


def _replace_file(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
