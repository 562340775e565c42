"""Runs one rank's actions of a verified plan: a loop over a table of handlers.

The executor owns every tensor on its way: an *edge* (source op, target op) holds one from the
action that brought it forth until the action that uses it up, then lets go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from megatron_pipeweaver.errors import PlanInvalidError, PlanMismatchError, TransferError
from megatron_pipeweaver.ir.plan import (
    ActionKind,
    ComputeAction,
    Message,
    Plan,
    PlanPass,
    TransferAction,
    VerifiedPlan,
)
from megatron_pipeweaver.ir.plan_text import format_action
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey, dependencies, receivers
from megatron_pipeweaver.ir.text import format_op
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.stage import StageRunner
from megatron_pipeweaver.runtime.transfer import Pending, Transport


class Executor:
    """Runs plans on one pipeline rank.

    Args:
        rank: pipeline rank.
        stages: computes; sees no messages.
        transport: moves messages; sees no ops.
        recorder: is told of every action.
    """

    def __init__(
        self, rank: int, stages: StageRunner, transport: Transport, recorder: Recorder
    ) -> None:
        self._rank = rank
        self._stages = stages
        self._transport = transport
        self._recorder = recorder

    def run(self, verified: VerifiedPlan) -> None:
        """Run this rank's actions of `verified`, in order, to the end.

        Raises:
            PlanInvalidError: `verified` is not a verified plan of a pipeline with this rank.
            PlanMismatchError: a stage's output is not of the planned shape.
            TransferError: a message did not go through; names rank, action, message and peer.
        """
        if not isinstance(verified, VerifiedPlan):
            raise PlanInvalidError("the executor runs verified plans only; call verify() first")
        plan = verified.plan
        if not 0 <= self._rank < plan.pipeline_size:
            raise PlanInvalidError(
                f"rank {self._rank} is not one of the plan's {plan.pipeline_size} pipeline ranks"
            )
        run = _Run(plan, self._stages, self._transport)
        for index, action in enumerate(plan.ranks[self._rank]):
            began = self._recorder.enter(index)
            try:
                run.handlers[action.kind](action)
            except (TransferError, PlanMismatchError) as error:
                where = f"rank {self._rank}, action {index}: `{format_action(plan, action)}`"
                raise type(error)(f"{where}: {error}") from error
            self._recorder.leave(began, computes=isinstance(action, ComputeAction))
        try:
            self._transport.finish()
        except TransferError as error:
            raise TransferError(f"rank {self._rank}, behind its last action: {error}") from error


def look_at(plan: Plan, rank: int) -> None:
    """Have everything of `plan` made that `rank` will look at, where that is made at first sight.

    For a thread beside training, before the plan runs.
    """
    for action in plan.ranks[rank]:
        if isinstance(action, TransferAction):
            for number in action.messages:
                _ = plan.messages[number]


class _Run:
    """One run of one plan on one rank: tensors on their edges, messages under way."""

    def __init__(self, plan: Plan, stages: StageRunner, transport: Transport) -> None:
        self._plan = plan
        self._stages = stages
        self._transport = transport
        self._graph = plan.graph()
        self._passes: dict[PassKey, PlanPass] = {one.key: one for one in plan.passes}
        self._held: dict[tuple[OpKey, OpKey], Tensor] = {}
        self._pending: dict[int, Pending] = {}
        self.handlers: Mapping[ActionKind, Callable[..., None]] = {
            ActionKind.FW_STAGE: self._forward,
            ActionKind.BW_STAGE: self._backward,
            ActionKind.WG_STAGE: self._weight_grad,
            ActionKind.ISEND: self._isend,
            ActionKind.IRECV: self._irecv,
            ActionKind.WAIT_ISEND: self._wait_isend,
            ActionKind.WAIT_IRECV: self._wait_irecv,
        }

    def _forward(self, action: ComputeAction) -> None:
        op = action.op
        output = self._stages.forward(
            self._passes[op.owner], op, action.strategy, self._take_inputs(op)
        )
        for target in receivers(self._graph, op):
            self._held[op, target] = output

    def _backward(self, action: ComputeAction) -> None:
        op = action.op
        grads = self._stages.backward(
            self._passes[op.owner], op, action.strategy, self._take_inputs(op)
        )
        forward = op.with_kind(OpKind.F)
        producers = [wait.op for wait in dependencies(self._graph, forward) if wait.carries_data]
        if len(grads) != len(producers):
            raise PlanMismatchError(
                f"the stage returned {len(grads)} input gradients for {len(producers)} inputs"
            )
        targets = receivers(self._graph, op)
        for producer, grad in zip(producers, grads, strict=True):
            target = producer.with_kind(OpKind.B)
            if target not in targets:
                continue  # a frozen producer takes no gradient
            if grad is None:
                raise PlanMismatchError(
                    f"the stage returned no gradient for `{format_op(producer)}`, which is not "
                    "frozen"
                )
            self._held[op, target] = grad

    def _weight_grad(self, action: ComputeAction) -> None:
        self._stages.weight_grad(self._passes[action.op.owner], action.op)

    def _isend(self, action: TransferAction) -> None:
        messages = [self._plan.messages[one] for one in action.messages]
        tensors = [self._held.pop((one.source, one.target)) for one in messages]
        for message, tensor in zip(messages, tensors, strict=True):
            _check_tensor(message, tensor)
        posted = self._transport.isend(messages, tensors)
        self._pending.update(zip(action.messages, posted, strict=True))

    def _irecv(self, action: TransferAction) -> None:
        messages = [self._plan.messages[one] for one in action.messages]
        posted = self._transport.irecv(messages)
        self._pending.update(zip(action.messages, posted, strict=True))

    def _wait_isend(self, action: TransferAction) -> None:
        for number in action.messages:
            self._pending.pop(number).wait()

    def _wait_irecv(self, action: TransferAction) -> None:
        for number in action.messages:
            message = self._plan.messages[number]
            self._held[message.source, message.target] = self._pending.pop(number).wait()

    def _take_inputs(self, op: OpKey) -> tuple[Tensor, ...]:
        """The tensors that `op` waited for, in the order of its dependencies."""
        return tuple(
            self._held.pop((wait.op, op))
            for wait in dependencies(self._graph, op)
            if wait.carries_data
        )


def _check_tensor(message: Message, tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != message.shape or dtype != message.dtype:
        raise PlanMismatchError(
            f"the stage made a {dtype} tensor of shape {tuple(tensor.shape)}, but {message.dtype} "
            f"of {message.shape} was planned; the batch is not the one that was planned"
        )
