"""Values of PipeWeaver's flags: as text on the command line, and in a file's JSON."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

from megatron_pipeweaver.ir.json_reader import JsonNode
from megatron_pipeweaver.ir.strategy import LayerStrategy


def parse_counts(text: str) -> Mapping[str, int]:
    """``vision=2,language=1`` as a mapping."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        module, _, number = part.partition("=")
        if not module.isidentifier() or not number.isdecimal() or module in counts:
            raise argparse.ArgumentTypeError(
                f"cannot read {part!r} of {text!r}; give each module once, as in "
                "vision=2,language=1"
            )
        counts[module] = int(number)
    return counts


def read_counts(node: JsonNode) -> Mapping[str, int]:
    """A JSON object of numbers, each 1 or more."""
    return {module: one.integer(1) for module, one in node.entries()}


_FALLBACK = re.compile(r"wait|static(:\d{1,9})?", re.ASCII)


def parse_fallback(text: str) -> str:
    """``static``, ``static:500`` or ``wait``, as it is."""
    if _FALLBACK.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(
            f"cannot read {text!r}; give static, static:MILLISECONDS or wait"
        )
    return text


def read_fallback(node: JsonNode) -> str:
    """``static``, ``static:500`` or ``wait`` in JSON."""
    text = node.text()
    if _FALLBACK.fullmatch(text) is None:
        node.fail(f"is {text!r}; give static, static:MILLISECONDS or wait")
    return text


def strategy_names(text: str) -> tuple[LayerStrategy, ...]:
    """``keep,offload`` as strategies; `ValueError` says what cannot be read."""
    names = text.split(",")
    known = [one.value for one in LayerStrategy]
    wrong = [one for one in names if one not in known or names.count(one) > 1]
    if wrong:
        raise ValueError(
            f"cannot read {wrong[0]!r} of {text!r}; give each strategy once, of {', '.join(known)}"
        )
    return tuple(map(LayerStrategy, names))


def parse_strategies(text: str) -> str:
    """``keep,offload``, as it is."""
    try:
        strategy_names(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def read_strategies(node: JsonNode) -> str:
    """A JSON array of strategies, as the flag has it."""
    text = ",".join(one.text() for one in node.array())
    try:
        strategy_names(text)
    except ValueError as error:
        node.fail(str(error))
    return text


def parse_layers(text: str) -> Mapping[str, tuple[int, ...]]:
    """``vision=4:4:4:3,language=2:2:2:2`` as layers per stage, by module."""
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        module, _, numbers = part.partition("=")
        layers = numbers.split(":")
        if not module.isidentifier() or module in found or not all(map(str.isdecimal, layers)):
            raise argparse.ArgumentTypeError(
                f"cannot read {part!r} of {text!r}; give each module once, with its layers per "
                "stage, as in vision=4:4:4:3,language=2:2:2:2"
            )
        found[module] = tuple(map(int, layers))
    return found


def read_layers(node: JsonNode) -> Mapping[str, tuple[int, ...]]:
    """A JSON object of arrays of numbers."""
    return {
        module: tuple(layers.integer(0) for layers in one.array()) for module, one in node.entries()
    }
