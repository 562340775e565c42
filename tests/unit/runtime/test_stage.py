"""ModuleStages: which gradients flow, when, and in which order they are added."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.plan import ActionKind, ComputeAction, PassPayload, Plan, PlanPass
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey
from megatron_pipeweaver.runtime.stage import ModuleStages

A, B, C, D = (PassKey(0, name, 0) for name in "abcd")


class Scale(torch.nn.Module):
    """Multiplies the sum of its inputs (ones where it has none) by a weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.calls = 0

    def forward(self, one: PlanPass, op: OpKey, inputs: tuple[Tensor, ...]) -> Tensor:
        self.calls += 1
        hidden = sum(inputs) if inputs else torch.ones(2)
        return hidden * self.weight


def _plan(frozen: tuple[PassKey, ...] = (), *actions: ComputeAction) -> Plan:
    """A diamond on one rank: a into b and c, both into d."""
    payload = PassPayload(item_start=0, item_stop=1, hidden_shape=(2,), output_shape=(2,))
    after = {A: (), B: (A,), C: (A,), D: (B, C)}
    return Plan(
        pipeline_size=1,
        modules=dict.fromkeys("abcd", 1),
        forward_only=False,
        memory_capacity_bytes=(0,),
        makespan_ns=0,
        passes=tuple(
            PlanPass(key=key, stages=1, after=waits, frozen=key in frozen, payload=payload)
            for key, waits in after.items()
        ),
        messages=(),
        ranks=(actions,),
    )


def _make(plan: Plan) -> tuple[ModuleStages, dict[str, Scale], dict[PassKey, PlanPass]]:
    chunks = {
        name: Scale(weight) for name, weight in zip("abcd", (2.0, 3.0, 5.0, 7.0), strict=True)
    }
    stages = ModuleStages(
        plan, {(name, 0): chunk for name, chunk in chunks.items()}, lambda _, out: out.sum()
    )
    return stages, chunks, {one.key: one for one in plan.passes}


def _op(kind: str, key: PassKey) -> OpKey:
    return OpKey(OpKind(kind), *key, 0)


def _forward(
    stages: ModuleStages, passes: dict[PassKey, PlanPass], strategy: str = "keep"
) -> dict[PassKey, Tensor]:
    outputs: dict[PassKey, Tensor] = {}
    for key, one in passes.items():
        inputs = tuple(outputs[producer] for producer in one.after)
        outputs[key] = stages.forward(one, _op("F", key), strategy, inputs)
    return outputs


@pytest.mark.parametrize("strategy", ["keep", "recompute"])
def test_gradients_of_several_producers_and_consumers(strategy: str) -> None:
    stages, chunks, passes = _make(_plan())
    outputs = _forward(stages, passes, strategy)
    assert not any(each.requires_grad for each in outputs.values())
    assert stages.losses[D] == outputs[D] == 2 * 2 * (3 + 5) * 7
    b_grad, c_grad = stages.backward(passes[D], _op("B", D), strategy, ())
    assert b_grad is not None
    assert c_grad is not None
    assert b_grad.tolist() == c_grad.tolist() == [7.0, 7.0]
    (from_b,) = stages.backward(passes[B], _op("B", B), strategy, (b_grad,))
    (from_c,) = stages.backward(passes[C], _op("B", C), strategy, (c_grad,))
    assert from_b is not None
    assert from_c is not None
    assert stages.backward(passes[A], _op("B", A), strategy, (from_b, from_c)) == ()
    found = {name: float(chunk.weight.grad or 0) for name, chunk in chunks.items()}
    assert found == {"a": 2 * 8 * 7, "b": 2 * 2 * 7, "c": 2 * 2 * 7, "d": 2 * 2 * 8}
    assert {chunk.calls for chunk in chunks.values()} == {2 if strategy == "recompute" else 1}


def test_several_gradients_are_added_from_left_to_right() -> None:
    stages, chunks, passes = _make(_plan())
    stages.forward(passes[A], _op("F", A), "keep", ())
    grads = tuple(torch.full((2,), one) for one in (1e8, 1.0, -1e8))  # exact only in one order
    stages.backward(passes[A], _op("B", A), "keep", grads)
    assert chunks["a"].weight.grad == 2 * ((torch.tensor(1e8) + 1.0) - 1e8)


def test_frozen_passes_build_no_graph_and_get_no_gradient() -> None:
    stages, chunks, passes = _make(_plan((A, B)))
    _forward(stages, passes)
    grads = stages.backward(passes[D], _op("B", D), "keep", ())
    assert grads[0] is None
    (to_a,) = stages.backward(passes[C], _op("B", C), "keep", (grads[1],))  # type: ignore[arg-type]
    assert to_a is None
    assert chunks["a"].weight.grad is chunks["b"].weight.grad is None
    stages.fill_missing_gradients()
    assert chunks["a"].weight.grad == 0


def test_zeros_flow_where_every_consumer_is_frozen() -> None:
    stages, chunks, passes = _make(_plan((D,)))
    _forward(stages, passes)
    (to_a,) = stages.backward(passes[B], _op("B", B), "keep", ())
    assert to_a is not None
    assert to_a.tolist() == [0.0, 0.0]
    assert chunks["b"].weight.grad is None


@pytest.mark.parametrize("strategy", ["keep", "recompute"])
def test_a_split_backward_leaves_the_weight_gradient_to_w(strategy: str) -> None:
    split = ComputeAction(
        kind=ActionKind.WG_STAGE, op=_op("W", B), strategy=strategy, memory_bytes=0
    )
    stages, chunks, passes = _make(_plan((), split))
    _forward(stages, passes, strategy)
    (grad,) = stages.backward(passes[B], _op("B", B), strategy, (torch.ones(2),))
    assert grad is not None
    assert grad.tolist() == [3.0, 3.0]
    assert chunks["b"].weight.grad is None
    stages.weight_grad(passes[B], _op("W", B))
    assert chunks["b"].weight.grad == 4.0
    assert chunks["b"].calls == (1 if strategy == "keep" else 2)


def test_evaluation_makes_losses_and_no_graph() -> None:
    stages, _, passes = _make(replace(_plan(), forward_only=True))
    outputs = _forward(stages, passes)
    assert stages.losses == {D: outputs[D]}
    assert not stages._alive


def test_an_unknown_strategy_is_named() -> None:
    stages, _, passes = _make(_plan())
    with pytest.raises(ConfigError, match=r"a0\.F0: strategy 'offload' cannot be run; known are"):
        stages.forward(passes[A], _op("F", A), "offload", ())
