"""Splitting a microbatch's items into uniform sub-microbatches, online (paper, section 3)."""

from __future__ import annotations

from megatron_pipeweaver.errors import ConfigError


def split(count: int, size: int) -> tuple[tuple[int, int], ...]:
    """Cut `count` items into ``ceil(count / size)`` contiguous, uniform sub-microbatches.

    Args:
        count: items of one module in one microbatch.
        size: the largest sub-microbatch, in items (the paper's B_i).

    Returns:
        ``(start, stop)`` item ranges in order; their lengths differ by at most one, the longer
        ones first. No items give no range, hence no pass.

    Raises:
        ConfigError: `count` is negative or `size` is below one.
    """
    if count < 0 or size < 1:
        raise ConfigError(
            f"sub-microbatches: {count} items in pieces of {size}; need items >= 0, pieces >= 1"
        )
    pieces = -(-count // size)
    if pieces == 0:
        return ()
    small, longer = divmod(count, pieces)
    stops = [small * (index + 1) + min(index + 1, longer) for index in range(pieces)]
    return tuple(zip([0, *stops[:-1]], stops, strict=True))
