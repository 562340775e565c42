"""Op names and grids that people and tests can read: ``vision0.F3``, ``vision0.B3.1``.

The form is ``<module><stage>.<kind><microbatch>[.<sub-microbatch>]``; sub-microbatch 0 is left
out. A module whose name ends in a digit or a colon is set off from its stage by a colon
(``clip2:0.F3``); white space and ``%`` in a name are written as in URLs (``%20``), so that every
op is one word of a grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote, unquote

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import OpKey, OpKind

_OP = re.compile(
    r"(?P<module>.+?):?(?P<stage>\d{1,18})\.(?P<kind>[FBW])(?P<microbatch>\d{1,18})"
    r"(?:\.(?P<sub>\d{1,18}))?",
    re.ASCII,
)


def format_op(op: OpKey) -> str:
    """The printed form of `op`, e.g. ``vision0.F3``."""
    return f"{format_stage(op.module, op.stage)}.{op.kind}{format_share(op)}"


def format_stage(module: str, stage: int) -> str:
    """``vision0``: a stage of a module."""
    # Most names are plain words.
    word = module if module.isalnum() else re.sub(r"[\s%]", lambda one: quote(one[0]), module)
    return f"{word}{':' if word[-1].isdigit() or word[-1] == ':' else ''}{stage}"


def format_share(op: OpKey) -> str:
    """``3`` or ``3.1``: microbatch and, unless it is 0, sub-microbatch."""
    return f"{op.microbatch}" + (f".{op.sub_microbatch}" if op.sub_microbatch else "")


def parse_op(text: str) -> OpKey:
    """The op that `format_op` printed as `text`.

    Raises:
        ConfigError: `text` is not such a form.
    """
    match = _OP.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an op; write it like vision0.F3 or vision0.B3.1")
    return OpKey(
        OpKind(match["kind"]),
        int(match["microbatch"]),
        unquote(match["module"]),
        int(match["sub"] or 0),
        int(match["stage"]),
    )


def format_grid(rows: Sequence[Sequence[str]]) -> str:
    """One line per rank: ``rank 0 | a b c``, cells padded to a common width per column."""
    width = max((len(cell) for row in rows for cell in row), default=0)
    return "\n".join(
        (f"rank {rank} | " + " ".join(cell.ljust(width) for cell in row)).rstrip()
        for rank, row in enumerate(rows)
    )


def parse_grid(text: str) -> list[list[str]]:
    """The cells that `format_grid` printed; blank lines are skipped.

    Raises:
        ConfigError: a line does not begin with the rank that is due.
    """
    rows: list[list[str]] = []
    for line in filter(str.strip, text.splitlines()):
        head, bar, cells = line.partition("|")
        if not bar or head.split() != ["rank", str(len(rows))]:
            raise ConfigError(f"grid line {line!r}: it must begin with 'rank {len(rows)} |'")
        rows.append(cells.split())
    return rows


def format_ops(ranks: Iterable[Iterable[OpKey]]) -> str:
    """The grid of an op order per rank."""
    return format_grid([[format_op(op) for op in ops] for ops in ranks])
