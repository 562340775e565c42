"""A backward in two halves: the same gradients to the last bit, and every product once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pipeweaver.runtime.split import SplitBackward

WIDTH = 4
PRODUCTS = ("mm", "addmm", "bmm")


class _Counted(TorchDispatchMode):
    """Counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Tied(nn.Module):
    """One weight twice on the way, once through a view that is made once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(self.other(self.inner(hidden)).tanh())  # type: ignore[no-any-return]


class Beside(nn.Module):
    """One normalised weight in two branches, of which none leads to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.inner.weight * self.scale / self.inner.weight.norm()
        left, right = hidden.sin() @ weight, hidden.cos() @ weight
        return left * right + right * hidden


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.position = nn.Parameter(torch.randn(3, WIDTH))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(hidden) + self.position).chunk(3, dim=-1)
        scores = (query @ key.transpose(-1, -2)).softmax(-1)
        return hidden + self.out(scores @ value)  # type: ignore[no-any-return]


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    ),
    "attention": lambda: nn.Sequential(Attention(), Attention()),
    "tied": Tied,
    "beside": Beside,
    "all": lambda: nn.Sequential(Attention(), Tied(), Beside(), nn.Linear(WIDTH, WIDTH)),
}


def _built(name: str) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[name]().double()


def _leaf() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * WIDTH, dtype=torch.float64).reshape(2, 3, WIDTH).clone()


def _whole(name: str, *, tracked: bool) -> tuple[Tensor | None, dict[str, Tensor | None], int]:
    model, hidden = _built(name), _leaf().requires_grad_(tracked)
    output = model(hidden)
    with _Counted() as counted:
        torch.autograd.backward(output, output.detach().sin())
    return (
        hidden.grad,
        {key: one.grad for key, one in model.named_parameters()},
        sum(counted.calls.values()),
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (
        one is not None and other is not None and torch.equal(one, other)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_halves_are_equal_to_the_whole_and_no_product_runs_twice(
    name: str, tracked: bool, at_once: bool
) -> None:
    to_input, to_weights, products = _whole(name, tracked=tracked)
    model, hidden = _built(name), _leaf().requires_grad_(tracked)
    weights = dict(model.named_parameters())
    output = model(hidden)
    with _Counted() as counted:
        inputs = [hidden] if tracked else []
        half = SplitBackward(output, inputs, list(weights.values()), at_once=at_once)
        half.input_grads(output.detach().sin())
        first = sum(counted.calls.values())
        assert _same(hidden.grad, to_input)
        assert all(one.grad is None for one in weights.values())
        half.weight_grads()
    assert all(_same(one.grad, to_weights[key]) for key, one in weights.items())
    assert sum(counted.calls.values()) == products
    assert first > 0 or not (tracked or at_once)
    assert (first < products) is not at_once


def test_only_what_is_used_twice_on_one_way_is_computed_early() -> None:
    products = {}
    for name in MODELS:
        model, hidden = _built(name), _leaf().requires_grad_()
        output = model(hidden)
        half = SplitBackward(output, [hidden], list(model.parameters()))
        with _Counted() as counted:
            half.input_grads(torch.ones_like(output))
        early = sum(counted.calls.values())
        with _Counted() as counted:
            half.weight_grads()
        products[name] = early, sum(counted.calls.values())
    assert products["mlp"] == (3, 3)
    assert products["tied"] == (3 + 2, 1)  # both uses of the one weight, early


def test_random_graphs_are_equal_to_the_whole() -> None:
    for seed in range(40):
        found = []
        for split in (False, True):
            rng = random.Random(seed)
            torch.manual_seed(seed)
            weights = [
                torch.randn(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(4)
            ]
            inputs = [_leaf().requires_grad_() for _ in range(2)]
            factors = [*weights, weights[0].tanh(), weights[1] @ weights[2]]
            made: list[Tensor] = list(inputs)
            for _ in range(6):
                left, right = rng.choice(made), rng.choice(made)
                made.append((left @ rng.choice(factors)).tanh() * right)
            output = made[-1].sum() + made[rng.randrange(len(made))].sum()
            if split:
                half = SplitBackward(output, inputs, weights)
                half.input_grads(torch.ones_like(output))
                half.weight_grads()
            else:
                output.backward()
            found.append([one.grad for one in (*inputs, *weights)])
        assert all(_same(one, other) for one, other in zip(*found, strict=True)), seed
