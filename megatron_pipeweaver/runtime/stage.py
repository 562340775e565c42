"""The autograd boundary: a stage's inputs come in as leaves, its output stays until its backward.

`StageRunner` is all that the executor knows of models. `ModuleStages` is one for plain torch
modules; the plugin has another for Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.plan import ComputeAction, Plan, PlanPass
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey
from megatron_pipeweaver.ir.text import format_op
from megatron_pipeweaver.runtime.split import SplitBackward


class StageRunner(Protocol):
    """Computes the ops of one rank's stages."""

    def forward(
        self, one: PlanPass, op: OpKey, strategy: str, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """The output of `op`, cut off from its autograd graph.

        Args:
            one: the pass of `op`.
            op: which forward.
            strategy: what it keeps for its backward.
            inputs: the hidden state of the stage before, or in stage 0 the outputs of the passes
                in `one.after`, in that order.
        """

    def backward(
        self, one: PlanPass, op: OpKey, strategy: str, output_grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs of `op`'s forward, in their order.

        `output_grads` holds one gradient per consumer that is not frozen: none where the stage
        makes the loss, or where every consumer is frozen. `None` may stand for an input whose
        producer is frozen.
        """

    def weight_grad(self, one: PlanPass, op: OpKey) -> None:
        """Add the weight gradients that the backward of `op` left out."""


def split_backwards(plan: Plan, rank: int | None = None) -> frozenset[OpKey]:
    """The backwards of `plan`, or of one `rank`, whose weight gradients are ops of their own."""
    return frozenset(
        action.op.with_kind(OpKind.B)
        for actions in (plan.ranks if rank is None else [plan.ranks[rank]])
        for action in actions
        if isinstance(action, ComputeAction) and action.op.kind is OpKind.W
    )


RunForward = Callable[[torch.nn.Module, PlanPass, OpKey, tuple[Tensor, ...]], Tensor]


def run_keeping(
    module: torch.nn.Module, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]
) -> Tensor:
    """Run a stage, keeping what its backward needs."""
    output: Tensor = module(one, op, inputs)
    return output


def run_recomputing(
    module: torch.nn.Module, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]
) -> Tensor:
    """Run a stage, keeping its inputs alone; its backward runs the forward again."""
    output: Tensor = checkpoint(module, one, op, inputs, use_reentrant=False)
    return output


STRATEGIES: Mapping[str, RunForward] = {"keep": run_keeping, "recompute": run_recomputing}
"""How a stage runs forward, by the strategy's name in the plan."""
AT_ONCE = frozenset({"recompute"})
"""Strategies whose weight gradients are computed in ``B``: nothing dropped is held until ``W``.

They are added there all the same, since the order of sums is the plan's.
"""


class _Alive(NamedTuple):
    """What a stage pair holds from its forward to its backward."""

    inputs: tuple[Tensor, ...]
    output: Tensor


class ModuleStages:
    """Stages made of plain torch modules, for one run of one plan.

    Args:
        plan: tells which passes make a loss (nobody consumes them) and which backwards are split.
        modules: this rank's chunks by module and stage, each called as
            ``module(one, op, inputs)``; its own input it finds by the pass `one`.
        loss: the scalar loss of a pass, from the output of its last stage.
        strategies: how to run a forward, by the strategy's name.
        at_once: those of them whose weight gradients are computed with the input gradients, and
            only added in the plan's ``W``.

    After the run `losses` holds the loss of every pass that made one on this rank.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[tuple[str, int], torch.nn.Module],
        loss: Callable[[PlanPass, Tensor], Tensor],
        strategies: Mapping[str, RunForward] = STRATEGIES,
        at_once: Collection[str] = AT_ONCE,
    ) -> None:
        self._graph = plan.graph()
        self._modules = modules
        self._loss = loss
        self._strategies = strategies
        self._at_once = at_once
        self._split = split_backwards(plan)
        self._alive: dict[tuple[PassKey, int], _Alive] = {}
        self._halves: dict[tuple[PassKey, int], SplitBackward] = {}
        self.losses: dict[PassKey, Tensor] = {}

    def forward(
        self, one: PlanPass, op: OpKey, strategy: str, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """See `StageRunner`."""
        if strategy not in self._strategies:
            raise ConfigError(
                f"{format_op(op)}: strategy {strategy!r} cannot be run; known are "
                f"{sorted(self._strategies)}"
            )
        trained = not self._graph.nodes[one.key].frozen
        if trained:
            inputs = self._as_leaves(one, op, inputs)
        with torch.set_grad_enabled(trained):
            output = self._strategies[strategy](self._module(op), one, op, inputs)
            if self._makes_loss(one, op):
                output = self._loss(one, output)
                self.losses[one.key] = output.detach()
        if trained:
            self._alive[one.key, op.stage] = _Alive(inputs, output)
        return output.detach()

    def backward(
        self, one: PlanPass, op: OpKey, strategy: str, output_grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """See `StageRunner`; gradients of several consumers are added from left to right.

        Where the backward is split, weight gradients are left to `weight_grad` (`runtime.split`).
        """
        alive = self._alive.pop((one.key, op.stage))
        grad = self._output_grad(one, op, alive.output, output_grads)
        tracked = [each for each in alive.inputs if each.requires_grad]
        if grad is None or not alive.output.requires_grad:
            return _zeros(alive.inputs)  # nothing flows back through this stage
        if op not in self._split:
            torch.autograd.backward(alive.output, grad)
        else:
            half = SplitBackward(
                alive.output, tracked, self._weights(op), at_once=strategy in self._at_once
            )
            half.input_grads(grad)
            self._halves[one.key, op.stage] = half
        return tuple(
            _or_zeros(each.grad, each) if each.requires_grad else None for each in alive.inputs
        )

    def weight_grad(self, one: PlanPass, op: OpKey) -> None:
        """See `StageRunner`."""
        half = self._halves.pop((one.key, op.stage), None)
        if half is not None:  # else nothing has flowed back
            half.weight_grads()

    def fill_missing_gradients(self) -> None:
        """Give zero gradients to the parameters that no pass of this run has reached."""
        for module in self._modules.values():
            for weight in module.parameters():
                if weight.requires_grad and weight.grad is None:
                    weight.grad = torch.zeros_like(weight)

    def _module(self, op: OpKey) -> torch.nn.Module:
        return self._modules[op.module, op.stage]

    def _weights(self, op: OpKey) -> list[Tensor]:
        return [each for each in self._module(op).parameters() if each.requires_grad]

    def _makes_loss(self, one: PlanPass, op: OpKey) -> bool:
        return op.stage == one.stages - 1 and not self._graph.consumers[one.key]

    def _as_leaves(
        self, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """`inputs` as leaves of this stage's graph; a frozen producer wants no gradient."""
        producers = one.after if op.stage == 0 else (one.key,)
        return tuple(
            each.detach().requires_grad_(not self._graph.nodes[producer].frozen)
            for producer, each in zip(producers, inputs, strict=True)
        )

    def _output_grad(
        self, one: PlanPass, op: OpKey, output: Tensor, grads: tuple[Tensor, ...]
    ) -> Tensor | None:
        if self._makes_loss(one, op):
            return torch.ones_like(output)
        return reduce(torch.add, grads) if grads else None


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _zeros(inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(torch.zeros_like(each) if each.requires_grad else None for each in inputs)
