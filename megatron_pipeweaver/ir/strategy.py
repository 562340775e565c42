"""Names of memory strategies, and what they say about each layer of a model chunk.

A name is one layer strategy for every layer (``keep``), or runs of layers from the first on:
``recompute*2+keep*6`` recomputes the first two layers of eight (paper, section 4.3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from itertools import groupby

from megatron_pipeweaver.errors import ConfigError

_RUN = re.compile(r"(?P<strategy>[a-z_]+)\*(?P<layers>[1-9]\d{0,5})", re.ASCII)


class LayerStrategy(StrEnum):
    """How a layer spends memory between its forward and its backward."""

    KEEP = "keep"
    """Every activation stays."""
    RECOMPUTE = "recompute"
    """The input alone stays; the whole forward runs again in front of the backward."""
    ATTENTION = "recompute_attention"
    """What attention keeps for itself is computed again from query, key and value."""
    NORM = "recompute_norm"
    """Outputs of norms are dropped and computed again from their inputs."""
    ACTIVATION = "recompute_activation"
    """Outputs of activations, those of experts too, are dropped and computed again."""
    LIGHT = "recompute_light"
    """Outputs of norms and activations are dropped and computed again from their inputs."""
    MLP = "recompute_mlp"
    """Of the MLP, or of router and experts, the input alone stays; all of it runs again."""
    SHARED_EXPERTS = "recompute_shared_experts"
    """Of experts that every token runs through the input alone stays; they run again."""
    UP_PROJECTION = "recompute_up_projection"
    """Of latent attention the latents stay; queries, keys and values are made of them again."""
    OFFLOAD = "offload"
    """Activations wait in host memory."""


_STRATEGIES = {one.value: one for one in LayerStrategy}


def strategy_name(strategies: Sequence[LayerStrategy]) -> str:
    """The shortest name that says what each layer of a chunk does, in forward order.

    A chunk without layers has nothing to choose: ``keep``.
    """
    runs = [(one, sum(1 for _ in run)) for one, run in groupby(strategies)]
    if len(runs) < 2:
        return runs[0][0].value if runs else LayerStrategy.KEEP.value
    return "+".join(f"{one}*{layers}" for one, layers in runs)


def layer_strategies(name: str, layers: int) -> tuple[LayerStrategy, ...]:
    """What `name` says about each of a chunk's `layers` layers, in forward order.

    Raises:
        ConfigError: there is no such strategy, or it is one of a chunk with other layers.
    """
    if name in _STRATEGIES:
        return (_STRATEGIES[name],) * layers
    found: list[LayerStrategy] = []
    for part in name.split("+"):
        run = _RUN.fullmatch(part)
        if run is None or run["strategy"] not in _STRATEGIES:
            raise ConfigError(
                f"memory strategy {name!r}: {part!r} is unknown; give one of "
                f"{', '.join(_STRATEGIES)} for every layer, or runs of layers like "
                "'recompute*2+keep*6'"
            )
        found += [_STRATEGIES[run["strategy"]]] * int(run["layers"])
    if len(found) != layers:
        raise ConfigError(
            f"memory strategy {name!r}: is of {len(found)} layers and the chunk has {layers}; "
            "let its counts add up to the chunk's layers"
        )
    return tuple(found)
