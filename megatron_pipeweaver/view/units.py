"""Numbers as people read them."""

from __future__ import annotations


def milliseconds(time_ns: int) -> str:
    """``1,234.5 ms``: one decimal from 10 ms on, three below."""
    return f"{time_ns / 1e6:,.{1 if time_ns >= 10_000_000 else 3}f} ms"


def percent(share: float) -> str:
    """``12.3 %``."""
    return f"{100 * share:.1f} %"


def size(size_bytes: int) -> str:
    """``39.1 GiB``: three digits in the largest fitting binary unit."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
