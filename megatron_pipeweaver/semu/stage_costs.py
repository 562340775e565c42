"""One stage pair, layer by layer: what every layer costs under every strategy, and any mixture.

compute   | layer 0 -- | layer 1 -- | layer 2 -- |      | layer 2 -- | layer 1 -- | ...
host link |            | 0 out ---- | 1 out ---- |      | 1 in - | 0 in ---- |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.ir.strategy import LayerStrategy, strategy_name


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCost:
    """One subgraph on one rank, under one strategy.

    `backward_ns` holds input gradients, all that runs again, and `weight_at_once_ns` for weight
    gradients that cannot run apart; `weight_grad_ns` is for those that can. The sum of
    `backward_ns` and `weight_grad_ns` is the backward in one piece. `held_bytes` stay from the
    forward to the backward, on the device or, for `host_bytes`, in host memory, which takes
    `copy_ns` each way. `exposed_forward_ns` and `exposed_backward_ns` are the parts of the forward
    and of the whole backward in which compute waits for communication. The peaks are those of this
    subgraph alone, what it holds included.
    """

    forward_ns: int
    backward_ns: int
    weight_grad_ns: int
    weight_at_once_ns: int = 0
    held_bytes: int
    host_bytes: int
    copy_ns: int
    exposed_forward_ns: int
    exposed_backward_ns: int
    forward_peak_bytes: int
    backward_peak_bytes: int

    @property
    def working_bytes(self) -> int:
        """What is needed for a while on top of `held_bytes`.

        A layer that comes back from the host does so while the one before it still works.
        """
        return max(self.forward_peak_bytes, self.backward_peak_bytes + self.host_bytes) - (
            self.held_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """`copies` equal subgraphs in a row; `costs` of one of them by strategy.

    What is no layer (embeddings, projectors, heads) keeps everything: it has ``keep`` alone.
    """

    copies: int
    is_layer: bool
    costs: Mapping[LayerStrategy, GraphCost]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """One stage pair on one rank: its parts in forward order.

    A stage holds `context_bytes` for its cross-attention whatever its layers do. A `frozen`
    module's weight gradients take no time.
    """

    parts: tuple[StagePart, ...]
    context_bytes: int
    frozen: bool

    @property
    def layers(self) -> tuple[Mapping[LayerStrategy, GraphCost], ...]:
        """By layer, in forward order: times and bytes under every strategy.

        Forward times, both backward times and `held_bytes` of layers add up, except that copies to
        and from the host hide behind the compute of other layers; see `strategy`.
        """
        return tuple(part.costs for part in self.parts if part.is_layer for _ in range(part.copies))

    def strategy(self, choice: Sequence[LayerStrategy]) -> Strategy:
        """The stage pair whose layer i runs under ``choice[i]``; named as in `ir.strategy`.

        The forward ends when every copy to the host has left, since its memory counts as free from
        then on. The backward has one layer more on the device than the one that it works on.

        Raises:
            ConfigError: `choice` is not of this stage's layers, or names what was not emulated.
        """
        return self._assembled(strategy_name(choice), self._chosen(choice))

    def host_bytes(self, choice: Sequence[LayerStrategy]) -> int:
        """What waits in host memory when layer i runs under ``choice[i]``.

        Raises:
            ConfigError: `choice` is not of this stage's layers, or names what was not emulated.
        """
        return sum(copies * one.host_bytes for one, copies in self._chosen(choice))

    def _chosen(self, choice: Sequence[LayerStrategy]) -> list[tuple[GraphCost, int]]:
        """Costs with how often each stands there in a row, in forward order."""
        layers = sum(part.copies for part in self.parts if part.is_layer)
        if len(choice) != layers:
            raise ConfigError(
                f"stage strategies: {len(choice)} choices for {layers} layers; give one a layer"
            )
        chosen: list[tuple[GraphCost, int]] = []
        start = 0
        for part in self.parts:
            if not part.is_layer:
                chosen.append((part.costs[LayerStrategy.KEEP], part.copies))
                continue
            mine = choice[start : start + part.copies]
            start += part.copies
            for one in mine:
                if one not in part.costs:
                    raise ConfigError(
                        f"stage strategies: {one.value!r} was not emulated; there are "
                        f"{[name.value for name in part.costs]}"
                    )
                cost = part.costs[one]
                if chosen and chosen[-1][0] is cost:
                    chosen[-1] = (cost, chosen[-1][1] + 1)
                else:
                    chosen.append((cost, 1))
        return chosen

    def uniform(self, strategy: LayerStrategy) -> Strategy:
        """The stage pair with every layer under `strategy`."""
        chosen = [
            (part.costs[strategy if part.is_layer else LayerStrategy.KEEP], part.copies)
            for part in self.parts
        ]
        return self._assembled(strategy.value, chosen)

    def _assembled(self, name: str, chosen: Sequence[tuple[GraphCost, int]]) -> Strategy:
        weight_grad_ns = sum(copies * one.weight_grad_ns for one, copies in chosen)
        at_once_ns = sum(copies * one.weight_at_once_ns for one, copies in chosen)
        held = sum(copies * one.held_bytes for one, copies in chosen)
        return Strategy(
            name=name,
            forward_ns=_forward_ns(chosen),
            backward_ns=_backward_ns(chosen) - weight_grad_ns - self.frozen * at_once_ns,
            weight_grad_ns=0 if self.frozen else weight_grad_ns,
            memory_bytes=held + self.context_bytes,
        )


def _forward_ns(chosen: Sequence[tuple[GraphCost, int]]) -> int:
    """Compute in order; a layer's copy leaves behind its forward, one after another."""
    compute = link = 0
    for one, copies in chosen:
        if not one.copy_ns:
            compute += copies * one.forward_ns
            continue
        for _ in range(copies):
            compute += one.forward_ns
            link = max(link, compute) + one.copy_ns
    return max(compute, link)


def _backward_ns(chosen: Sequence[tuple[GraphCost, int]]) -> int:
    """Compute in reverse order; a layer's copy comes back while the layer before it works."""
    compute = link = before = 0
    for one, copies in reversed(chosen):
        whole = one.backward_ns + one.weight_grad_ns
        if not one.copy_ns:
            compute += copies * whole
            before = compute - whole if copies else before
            continue
        for _ in range(copies):
            link = max(link, before) + one.copy_ns
            before = max(compute, link)
            compute = before + whole
    return compute
