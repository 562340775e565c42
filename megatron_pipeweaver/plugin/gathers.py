"""Overlapped gathering of parameters, whatever schedule each replica runs.

A distributed optimizer leaves each replica a share of the new parameters; with
``--overlap-param-gather`` Megatron's hooks gather the rest bucket by bucket as the forwards need
them. Replicas run different schedules here, and one with text alone never runs an encoder, so the
hooks would start the gathers in different orders. They are all started in front of the schedule
instead, in the order of the chunk list, and all ended behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def gathered_parameters(chunks: Sequence[Any]) -> Iterator[None]:
    """Start the gathers of all `chunks` in one order; the hooks await them, chunk by chunk.

    Does nothing for chunks whose parameters are whole already: without overlap, in evaluation, and
    in Megatron's first iteration.

    Args:
        chunks: the rank's model, wrapped in Megatron's DDP.
    """
    overlapped = [
        chunk for chunk in chunks if getattr(chunk, "remove_forward_pre_hook_handles", None)
    ]
    for chunk in overlapped:
        chunk.start_param_sync()
    yield
    for chunk in overlapped:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            group.finish_param_sync(skip_next_bucket_dispatch=True)
