"""Files named on the command line: read strictly, refused early, written whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import (
    SCHEDULE_FORMAT,
    TRACE_FORMAT,
    digest,
    problem_from_json,
    schedule_from_json,
    trace_from_json,
)
from megatron_pipeweaver.ir.json_reader import parse_json, read_bytes
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.ir.trace import Trace

_READERS: Mapping[str, Callable[[bytes, str], Schedule | Trace]] = {
    SCHEDULE_FORMAT: schedule_from_json,
    TRACE_FORMAT: trace_from_json,
}


def load_problem(path: Path) -> tuple[Problem, str]:
    """The problem at `path` and the SHA-256 of its bytes.

    Raises:
        ConfigError: it cannot be read or is no problem file.
    """
    data = read_bytes(path)
    return problem_from_json(data, str(path)), digest(data)


def load_schedule(path: Path) -> Schedule:
    """The schedule at `path`; `ConfigError` if it cannot be read or is none."""
    return schedule_from_json(read_bytes(path), str(path))


def load_schedule_or_trace(path: Path) -> Schedule | Trace:
    """What stands at `path`, as its `format` says.

    Raises:
        ConfigError: it cannot be read or is neither.
    """
    data = read_bytes(path)
    root = parse_json(data, str(path))
    named = root.get("format")
    if named is None:
        root.fail(f"key 'format' is missing; add one of {list(_READERS)}")
    if named.text() not in _READERS:
        named.fail(f"is {named.text()!r}; it must be one of {list(_READERS)}")
    return _READERS[named.text()](data, str(path))


def refuse_bad_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Refuse, before any work is done, outputs that cannot be written or would overwrite an input.

    Raises:
        ConfigError: names the file and the mend.
    """
    taken = {path.resolve(): "is read as well" for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():  # a device or a pipe
            continue
        if path.resolve() in taken:
            raise ConfigError(f"{path}: {taken[path.resolve()]}; name another file")
        taken[path.resolve()] = "is written twice"
        folder = next(one for one in path.resolve().parents if one.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{path}: cannot be written ({folder} is not a writable folder)")
