"""PipeWeaver's flags in Megatron's parser.

    parser ─► add_pipeweaver_arguments ─► Megatron parses ─► read_arguments ─► PipeWeaverArguments

A value on the command line wins over the same one in the file of ``--pipeweaver-config``, a JSON
object whose keys are the flags' names behind ``--pipeweaver-``, with underscores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.json_reader import JsonNode, parse_json, read_bytes
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.plugin.flag_values import (
    parse_counts,
    parse_fallback,
    parse_layers,
    parse_strategies,
    read_counts,
    read_fallback,
    read_layers,
    read_strategies,
    strategy_names,
)

PREFIX = "pipeweaver_"
"""In front of every attribute that the flags make, but for ``args.pipeweaver`` itself."""
_FILE = "config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """How long training waits for a searched plan, in milliseconds, before a static one runs.

    Then the planner has a process of its own. `None`: it plans in the training process, which
    waits for every search.
    """

    bound_ms: int | None


STATIC = Fallback(bound_ms=2000)
WAIT = Fallback(bound_ms=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeWeaverArguments:
    """What the flags ask for; every field is the flag of the same name.

    `sub_microbatch`, `segments` and `layers` hold the modules that are named, the others are chosen
    by the emulated times. `device_profile` is `None` for the device that is found, `strategies` for
    what pays on it; `dry_run` is `None` where training runs.
    """

    search_seconds: float = 1.0
    search_threads: int = 1
    sub_microbatch: Mapping[str, int] = field(default_factory=dict)
    segments: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    balance: bool = False
    device_profile: str | None = None
    strategies: tuple[LayerStrategy, ...] | None = None
    memory_fraction: float = 0.9
    host_memory_fraction: float = 0.4
    deterministic: bool = False
    fallback: Fallback = STATIC
    trace_dir: Path | None = None
    dry_run: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.search_seconds <= 1e6:
            raise ConfigError(
                f"--pipeweaver-search-seconds {self.search_seconds}: give seconds from 0 to 1000000"
            )
        if self.search_threads < 1:
            raise ConfigError(f"--pipeweaver-search-threads {self.search_threads}: give at least 1")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                f"--pipeweaver-memory-fraction {self.memory_fraction}: give a share of the "
                "device's memory above 0 and up to 1"
            )
        if not 0 <= self.host_memory_fraction <= 1:
            raise ConfigError(
                f"--pipeweaver-host-memory-fraction {self.host_memory_fraction}: give a share of "
                "the node's memory from 0 to 1"
            )
        if self.dry_run is not None and self.dry_run < 1:
            raise ConfigError(f"--pipeweaver-dry-run {self.dry_run}: give at least 1 batch")
        for module in self.layers.keys() & self.segments:
            raise ConfigError(
                f"{_flag('layers')} and {_flag('segments')} of {module}: its layers say how many "
                "segments it has; give one of them"
            )
        for flag in ("sub_microbatch", "segments"):
            for module, count in getattr(self, flag).items():
                if count < 1:
                    raise ConfigError(f"{_flag(flag)} {module}={count}: give at least 1")

    def search_config(self, seed: int, *, split_weight_grad: bool) -> SearchConfig:
        """The search's settings; whether it may split backwards depends on the layers."""
        return SearchConfig(
            time_budget_ns=round(self.search_seconds * SECOND_NS),
            threads=self.search_threads,
            seed=seed,
            deterministic=self.deterministic,
            split_weight_grad=split_weight_grad,
        )


def add_pipeweaver_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add PipeWeaver's group to Megatron's parser, and return it, as Megatron's own do."""
    group = parser.add_argument_group(title="pipeweaver")
    group.add_argument(
        "--pipeweaver",
        action="store_true",
        help="Cut every modality module into pipeline segments of its own, and run a schedule "
        "searched for each batch.",
    )
    group.add_argument(
        _flag(_FILE),
        metavar="FILE",
        help='JSON object of the flags below, as in {"search_seconds": 2, "segments": '
        '{"vision": 2}}; flags on the command line win.',
    )
    for name, one in _FLAGS.items():
        group.add_argument(_flag(name), **one.options)
    return parser


def read_arguments(args: argparse.Namespace) -> PipeWeaverArguments | None:
    """PipeWeaver's arguments, checked against each other; `None` without ``--pipeweaver``.

    Args:
        args: what Megatron's parser made.

    Raises:
        ConfigError: a value is wrong, or a flag stands there without ``--pipeweaver``.
    """
    names = (_FILE, *_FLAGS)
    given = {
        name: value for name in names if (value := getattr(args, PREFIX + name, None)) is not None
    }
    if not getattr(args, "pipeweaver", False):
        if given:
            raise ConfigError(
                f"{_flag(next(iter(given)))}: does nothing without --pipeweaver; add --pipeweaver"
            )
        return None
    path = given.pop(_FILE, None)
    values = {} if path is None else _read_file(Path(path))
    values |= given
    return PipeWeaverArguments(**{name: _FLAGS[name].make(one) for name, one in values.items()})


def settle_virtual_size(args: argparse.Namespace, virtual_size: int) -> None:
    """Have Megatron build `virtual_size` chunks per rank, the sum of all modules' segments."""
    args.virtual_pipeline_model_parallel_size = virtual_size if virtual_size > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flag:
    """How argparse takes a flag, how a file's value is read, and what is made of either.

    Megatron saves its arguments with every checkpoint, so they hold plain values alone.
    """

    options: Mapping[str, Any]
    read: Callable[[JsonNode], Any]
    make: Callable[[Any], Any] = lambda value: value


def _flag(name: str) -> str:
    return "--" + (PREFIX + name).replace("_", "-")


def _make_fallback(text: str) -> Fallback:
    if text == "wait":
        return WAIT
    _, _, bound = text.partition(":")
    return Fallback(bound_ms=int(bound)) if bound else STATIC


_FLAGS: Mapping[str, _Flag] = {
    "search_seconds": _Flag(
        options={
            "type": float,
            "metavar": "SECONDS",
            "help": "How long to search for the schedule of one batch. Default 1.",
        },
        read=JsonNode.number,
    ),
    "search_threads": _Flag(
        options={
            "type": int,
            "metavar": "N",
            "help": "Threads of the search, on the first rank of each replica. Default 1.",
        },
        read=JsonNode.integer,
    ),
    "sub_microbatch": _Flag(
        options={
            "type": parse_counts,
            "metavar": "MODULE=N[,...]",
            "help": "Most items of a module (images of vision) that one pass works on, as in "
            "vision=12. Chosen by emulated times where left out.",
        },
        read=read_counts,
    ),
    "segments": _Flag(
        options={
            "type": parse_counts,
            "metavar": "MODULE=K[,...]",
            "help": "Pipeline segments of a module, as in vision=2,language=1; their sum is the "
            "virtual pipeline size. Chosen by emulated times where left out.",
        },
        read=read_counts,
    ),
    "layers": _Flag(
        options={
            "type": parse_layers,
            "metavar": "MODULE=N:N:...[,...]",
            "help": "Layers of every stage of a module, as in vision=4:4:4:3,language=2:2:2:2; as "
            "many stages as pipeline ranks, or a multiple for several segments.",
        },
        read=read_layers,
    ),
    "balance": _Flag(
        options={
            "action": "store_true",
            "default": None,
            "help": "Search segments and layers per stage once, by the schedules of batches as "
            "they are expected, and log what was found as --pipeweaver-layers takes it.",
        },
        read=JsonNode.boolean,
    ),
    "device_profile": _Flag(
        options={
            "metavar": "NAME|FILE",
            "help": "Device to emulate: a shipped profile's name (H100, A100, cpu, ...) or a "
            "profile's file. Found by the device's name where left out.",
        },
        read=JsonNode.text,
    ),
    "strategies": _Flag(
        options={
            "type": parse_strategies,
            "metavar": "NAME[,...]",
            "help": "What plans may have a layer do with its activations, as in "
            "keep,recompute,recompute_mlp,offload. Chosen by the device where left out.",
        },
        read=read_strategies,
        make=strategy_names,
    ),
    "memory_fraction": _Flag(
        options={
            "type": float,
            "metavar": "SHARE",
            "help": "Share of the device's memory that weights, optimizer and activations may "
            "take. Default 0.9.",
        },
        read=JsonNode.number,
    ),
    "host_memory_fraction": _Flag(
        options={
            "type": float,
            "metavar": "SHARE",
            "help": "Share of the node's memory that offloaded activations of its ranks may take; "
            "pinned memory is given out in powers of two, so up to twice as much is taken. "
            "Default 0.4.",
        },
        read=JsonNode.number,
    ),
    "deterministic": _Flag(
        options={
            "action": "store_true",
            "default": None,
            "help": "Accumulate gradients in one order whatever the schedule is.",
        },
        read=JsonNode.boolean,
    ),
    "fallback": _Flag(
        options={
            "type": parse_fallback,
            "metavar": "static[:MILLISECONDS]|wait",
            "help": "Plan in a process of its own, and run the best static schedule where the "
            "searched one is not there within so many milliseconds (static, the default, waits "
            "2000), or have every iteration wait for its search (wait).",
        },
        read=read_fallback,
        make=_make_fallback,
    ),
    "trace_dir": _Flag(
        options={
            "metavar": "DIR",
            "help": "Write the problem, schedule, plan and measured trace of every iteration "
            "there.",
        },
        read=JsonNode.text,
        make=Path,
    ),
    "dry_run": _Flag(
        options={
            "type": int,
            "metavar": "N",
            "help": "Plan the first N batches from their metadata, print memory and time, and "
            "end; needs one process and no GPU.",
        },
        read=JsonNode.integer,
    ),
}
"""Every flag but the switch and the file, by the name of its field."""


def _read_file(path: Path) -> dict[str, Any]:
    root = parse_json(read_bytes(path), str(path))
    root.keys(frozenset(), optional=frozenset(_FLAGS))
    return {name: _FLAGS[name].read(node) for name, node in root.entries()}
