"""Offloaded layers: gradients stay the same, copies are few, two layers at most come back."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from megatron_pipeweaver.runtime.activations import ActivationMeter
from megatron_pipeweaver.runtime.entry import Entry
from megatron_pipeweaver.runtime.offload import HostOffload

BYTES = 4 * 16 * 8


def _layers(count: int = 4) -> list[torch.nn.Sequential]:
    torch.manual_seed(0)
    return [
        torch.nn.Sequential(torch.nn.Linear(16, 16, dtype=torch.float64), torch.nn.Tanh())
        for _ in range(count)
    ]


def _input() -> Tensor:
    return torch.linspace(-1, 1, 4 * 16, dtype=torch.float64).reshape(4, 16).requires_grad_()


def _run(layers: list[torch.nn.Sequential], offload: HostOffload, hidden: Tensor) -> Tensor:
    for layer in layers:
        with offload.saving(layer.parameters()):
            hidden = layer(hidden)
    return hidden


def test_gradients_stay_the_same_and_parameters_stay_where_they_are() -> None:
    layers = _layers()
    expected = torch.nn.Sequential(*layers)(_input()).sum()
    expected.backward()
    grads = [one.grad for layer in layers for one in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    offload = HostOffload()
    loss = _run(layers, offload, _input()).sum()
    # Of each layer its input and the output of its tanh, once each.
    assert offload.host_bytes == len(layers) * 2 * BYTES
    loss.backward()
    found = [one.grad for layer in layers for one in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, found, strict=True))
    offload.finish()
    assert offload.host_bytes == 0


def test_two_layers_at_most_are_back() -> None:
    layers, offload = _layers(), HostOffload()
    most = []
    for layer in layers:
        layer[0].register_full_backward_hook(
            lambda *_: most.append(sum(one.nbytes for one in offload.back()))
        )
    loss = _run(layers, offload, _input()).sum()
    assert not list(offload.back())
    offload.prefetch()
    assert sum(one.nbytes for one in offload.back()) == 2 * BYTES
    loss.backward()
    assert max(most) == 2 * 2 * BYTES


def test_nothing_is_left_on_the_device() -> None:
    layers, offload = _layers(), HostOffload()
    meter = ActivationMeter(one for layer in layers for one in layer.parameters())
    with meter.recording():
        loss = _run(layers, offload, _input())
    assert meter.held_bytes == 0
    del loss


def test_an_address_that_comes_again_is_another_tensor() -> None:
    """A saved storage that was freed must not lend its copy to the next one at its address."""
    offload = HostOffload()
    scale = torch.ones(64, dtype=torch.float64, requires_grad=True)
    products = []
    with offload.saving(()):
        for value in (2.0, 3.0, 5.0):
            factor = torch.full((64,), value, dtype=torch.float64)
            products.append(scale * factor)
            del factor  # its memory is free for the next one
            gc.collect()
    sum(products).sum().backward()  # type: ignore[union-attr]
    assert scale.grad is not None
    assert scale.grad.tolist() == [10.0] * 64


def test_views_come_back_as_views_of_one_copy() -> None:
    offload = HostOffload()
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    with offload.saving(()):
        left, right = (whole * 1).chunk(2, dim=1)
        loss = (left * right).sum()
    assert offload.host_bytes == 12 * 4
    loss.backward()
    assert whole.grad is not None
    swapped = torch.arange(12.0).reshape(3, 4)[:, [2, 3, 0, 1]]
    assert torch.equal(whole.grad, swapped)


def test_entries_catch_gradients_and_hold_nothing() -> None:
    first, second = torch.ones(2, 3), torch.full((2, 3), 2.0)
    entry = Entry((first, second), (True, False))
    a, b = entry.begin((first, second))
    (a.t() * b.t()).sum().backward()
    caught, missing = entry.grads()
    assert missing is None
    assert caught is not None
    assert torch.equal(caught, second)
    assert caught.stride() == first.stride()  # as a leaf's gradient is laid out
    assert [one.shape for one in entry.zeros()] == [first.shape] * 2
    assert first.grad is None
