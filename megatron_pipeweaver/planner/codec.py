"""Frozen dataclasses as strict JSON: how settings and metadata reach the planner's process.

Written and read by the fields' types, so a field that is added travels without further code. What
is `None` is left out; everything else must be there, and nothing more. Values check themselves
when they are made, and a refusal names the place in the JSON.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from megatron_pipeweaver.ir.json_reader import JsonNode

_T = TypeVar("_T")


def to_json(value: object) -> Any:
    """`value` as what `json` writes: dataclasses, mappings, tuples, enums, numbers, text.

    Raises:
        TypeError: a value of another kind.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((one.name, getattr(value, one.name)) for one in dataclasses.fields(value))
        return {name: to_json(found) for name, found in fields if found is not None}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # as text, which any reader gives back to the last bit
    if isinstance(value, tuple | list):
        return [to_json(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def from_json(node: JsonNode, kind: type[_T]) -> _T:
    """The `kind` that `to_json` wrote at `node`.

    Raises:
        ConfigError: something is missing, unknown, of another type, or refused by `kind` itself.
    """
    return cast(_T, _read(node, kind))


def _read(node: JsonNode, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        (wanted,) = (one for one in get_args(kind) if one is not type(None))
        return _read(node, wanted)
    if origin is tuple:
        item, *_ = get_args(kind)
        return tuple(_read(one, item) for one in node.array())
    if origin is not None:  # a mapping
        key, item = get_args(kind)
        return {_key(node, name, key): _read(one, item) for name, one in node.entries()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(node, cast(type, kind))
    if issubclass(kind, StrEnum):
        return _key(node, node.text(), kind)
    return _READERS[kind](node)


def _read_float(node: JsonNode) -> float:
    try:
        return float(node.text())
    except ValueError:
        node.fail(f"is {node.text()!r}; it must be a number, as text")


_READERS: Mapping[type, Callable[[JsonNode], bool | int | float | str]] = {
    float: _read_float,
    bool: JsonNode.boolean,
    int: JsonNode.integer,
    str: JsonNode.text,
}


def _key(node: JsonNode, name: str, kind: Any) -> Any:
    if kind is str:
        return name
    if name not in [one.value for one in kind]:
        node.fail(f"{name!r} is none of {[one.value for one in kind]}")
    return kind(name)


def _read_dataclass(node: JsonNode, kind: type) -> Any:
    hints = _hints(kind)
    may_lack = frozenset(name for name, hint in hints.items() if type(None) in get_args(hint))
    node.keys(frozenset(hints) - may_lack, optional=may_lack)
    given = {
        name: None if node.get(name) is None else _read(node[name], hint)
        for name, hint in hints.items()
    }
    return node.build(kind, **given)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}
