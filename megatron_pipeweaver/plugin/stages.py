"""PipeWeaver's stages as Megatron runs them: its forward step, its backward step, its loss rules.

The executor hands over what arrived; everything Megatron does around a step (autocast, dividing
the loss, loss scaling, deallocating outputs) stays Megatron's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.plan import Plan, PlanPass
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.weight_grad import LeftOut
from megatron_pipeweaver.plugin import compat
from megatron_pipeweaver.runtime.activations import MemoryGauge
from megatron_pipeweaver.runtime.entry import Entry
from megatron_pipeweaver.runtime.offload import HostOffload
from megatron_pipeweaver.runtime.stage import split_backwards


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What Megatron's schedule function was called with, as far as single steps need it."""

    forward_step_func: Callable[..., Any]
    model: Sequence[torch.nn.Module]
    microbatches: Sequence[Mapping[str, Any] | None]
    config: Any
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None


def unwrap(model: torch.nn.Module) -> ModelChunk:
    """The PipeWeaver chunk inside Megatron's wrappers (DDP, Float16Module)."""
    chunk = get_attr_wrapped_model(model, "place", return_model_obj=True)
    assert isinstance(chunk, ModelChunk)
    return chunk


class _Alive(NamedTuple):
    """What a stage pair holds from its forward to its backward."""

    entry: Entry
    output: Tensor
    left_out: LeftOut
    offload: HostOffload


class MegatronStages:
    """The stages of one rank in one iteration; a `StageRunner` for the executor.

    Args:
        context: what Megatron's schedule function was called with.
        layout: where the layers live.
        plan: what is going to run.
        gauge: told of what is held, where memory is measured.
        copies: the stream of copies to and from the host, where there are streams.
        rank: this pipeline rank, whose actions alone are then looked at.
    """

    def __init__(
        self,
        context: StepContext,
        layout: ChunkLayout,
        plan: Plan,
        gauge: MemoryGauge | None = None,
        copies: Any = None,
        *,
        rank: int | None = None,
    ) -> None:
        self._context = context
        self._layout = layout
        self._frozen = frozenset(one.key for one in plan.passes if one.frozen)
        self._chunks = [unwrap(one) for one in context.model]
        self._split = split_backwards(plan, rank)
        self._alive: dict[tuple[PassKey, int], _Alive] = {}
        self._left_out: dict[tuple[PassKey, int], LeftOut] = {}
        self._copies = copies
        self._gauge = gauge
        self._outcomes: dict[int, list[Any]] = {}
        self._started: set[int] = set()
        self.num_tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())

    def forward(
        self, one: PlanPass, op: OpKey, strategy: str, inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """Run the forward of `op` on what arrived from its producers.

        Returns:
            The output, cut off from the autograd graph, which is kept for the backward.
        """
        context = self._context
        virtual_stage = self._layout.virtual_stage(op.module, op.stage)
        chunk = self._chunks[virtual_stage]
        offload = HostOffload(self._copies)
        chunk.set_pass(one)
        chunk.set_strategy(strategy, offload)
        trained = not (one.frozen or context.forward_only)
        entry = self._entry(one, op, inputs)
        if trained:
            inputs = entry.begin(inputs)
        outcomes: list[Any] = []
        split = op.with_kind(OpKind.B) in self._split
        gradients = chunk.weight_gradients
        recording = nullcontext() if self._gauge is None else self._gauge.recording()
        with (
            torch.set_grad_enabled(trained),
            gradients.leaving_out(split) as left_out,
            recording,
        ):
            output, num_tokens = compat.forward_step(
                context.forward_step_func,
                iter([context.microbatches[op.microbatch]]),
                context.model[virtual_stage],
                len(context.microbatches),
                list(inputs) or [None],
                outcomes,
                context.config,
                1,  # context-parallel ranks all hand out the whole loss
                collect_non_loss_data=context.collect_non_loss_data,
                is_first_microbatch=self._is_first_use(virtual_stage),
                current_microbatch=op.microbatch,
                vp_stage=chunk.vp_stage,
                is_last_stage=self._makes_loss(op),
            )
        offload.settle()
        self.num_tokens += num_tokens
        if outcomes:
            self._outcomes.setdefault(op.microbatch, []).extend(outcomes)
        # Megatron's layers add their biases with gradients enabled, even where they are disabled.
        graph_end, handed_on = output[0], output[0].detach()
        if trained:
            self._alive[op.owner, op.stage] = _Alive(entry, graph_end, left_out, offload)
            compat.deallocate_output_tensor(
                graph_end, context.config.deallocate_pipeline_outputs and not self._makes_loss(op)
            )
        self._note_memory()
        return handed_on

    def backward(
        self, one: PlanPass, op: OpKey, strategy: str, output_grads: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Run the backward of `op`.

        Args:
            one: the pass of `op`.
            op: which backward.
            strategy: the strategy its forward ran under.
            output_grads: one gradient per consumer, none where this stage makes the loss.

        Returns:
            The gradients of the inputs, in the order of the producers; `None` for a producer
            that is frozen.
        """
        del strategy  # it was baked into the graph by the forward
        entry, output, left_out, offload = self._alive.pop((op.owner, op.stage))
        unused = not output_grads and not self._makes_loss(op)
        if unused or not output.requires_grad:
            # Every consumer is frozen, or all that made the output is: nothing flows back, the
            # parameters keep zero gradients.
            return entry.zeros()
        output_grad = sum_in_order(output_grads)
        offload.prefetch()
        compat.backward_step([None], output, output_grad, self._context.config)
        offload.finish()
        if op in self._split:
            self._left_out[op.owner, op.stage] = left_out
        else:
            left_out.finish()
        self._note_memory()
        return entry.grads()

    def weight_grad(self, one: PlanPass, op: OpKey) -> None:
        """Compute and accumulate the weight gradients that the backward of `op` left out."""
        left_out = self._left_out.pop((op.owner, op.stage), None)
        if left_out is not None:  # else nothing has flowed back
            left_out.finish()

    def losses(self) -> list[Any]:
        """What the loss function reported, by microbatch whatever the schedule was."""
        return [each for index in sorted(self._outcomes) for each in self._outcomes[index]]

    def _note_memory(self) -> None:
        """Tell the gauge what this rank holds besides what autograd does."""
        if self._gauge is None:
            return
        offloads = (one.offload for one in self._alive.values())
        held = [tensor for one in self._left_out.values() for tensor in one.tensors()]
        held += [tensor for one in offloads for tensor in one.back()]
        self._gauge.note(held)

    def _entry(self, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]) -> Entry:
        """Where the graph of `op` begins; a frozen producer wants no gradient back."""
        producers = one.after if op.stage == 0 else (op.owner,)
        return Entry(inputs, [producer not in self._frozen for producer in producers])

    def _makes_loss(self, op: OpKey) -> bool:
        layout = self._layout.modules[-1]
        return op.module == layout.module and op.stage == len(layout.layers) - 1

    def _is_first_use(self, virtual_stage: int) -> bool:
        first = virtual_stage not in self._started
        self._started.add(virtual_stage)
        context = self._context
        if context.first_val_step is not None and context.forward_only:
            return first and context.first_val_step
        return first


def sum_in_order(grads: Sequence[Tensor]) -> Tensor | None:
    """The sum of `grads`, added from left to right; `None` where there is none."""
    total: Tensor | None = None
    for grad in grads:
        total = grad if total is None else total + grad
    return total
