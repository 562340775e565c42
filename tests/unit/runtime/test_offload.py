"""Offloaded layers: gradients stay the same, copies are few, two layers at most come back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
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


class _Stream:
    """A stream of a device that is played by the CPU; `told` is shared by all of them."""

    def __init__(self, name: str, device: str, told: list[tuple[Any, ...]]) -> None:
        self.name, self.device, self.told = name, torch.device(device), told

    def wait_stream(self, other: _Stream) -> None:
        self.told.append((self.name, "waits for", other.name))

    def record_event(self) -> tuple[str, int]:
        event = (self.name, len(self.told))
        self.told.append((self.name, "event", event))
        return event

    def wait_event(self, event: tuple[str, int]) -> None:
        self.told.append((self.name, "waits for", event))


@pytest.fixture(name="told")
def _told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What streams were told; torch's own calls for them are played."""
    told: list[tuple[Any, ...]] = []
    running = ["compute"]
    empty_like, copy_ = torch.empty_like, Tensor.copy_

    @contextlib.contextmanager
    def on(stream: _Stream) -> Iterator[None]:
        running.append(stream.name)
        yield
        running.pop()

    def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            told.append((running[-1], "copies", source.nbytes))
        return copy_(target, source)

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty_like(*args, **options)

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: _Stream("compute", "cpu", told))
    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(
        Tensor,
        "record_stream",
        lambda one, stream: told.append((stream.name, "uses", one.nbytes)),
    )
    return told


def test_each_stream_waits_for_the_other_and_memory_outlives_the_copies(
    told: list[tuple[Any, ...]],
) -> None:
    layers, offload = _layers(1), HostOffload(_Stream("copy", "cpu", told))
    loss = _run(layers, offload, _input()).sum()
    out = [
        ("copy", "waits for", "compute"),  # what it copies has been computed
        ("copy", "copies", BYTES),
    ]
    for start in (0, 3):  # the input of the layer, and the output of its tanh
        assert told[start : start + 2] == out
        assert told[start + 2] == ("copy", "event", ("copy", start + 2))
    told.clear()
    offload.settle()
    assert told == [("copy", "uses", BYTES)] * 2  # the memory is not given out again before
    told.clear()
    offload.prefetch()
    loss.backward()
    back = [one for one in told if one[0] == "copy"]
    assert [one[1] for one in back] == 2 * ["waits for", "waits for", "copies", "event"]
    assert [one[2] for one in back if one[1] == "waits for"] == [
        "compute",
        ("copy", 2),  # what comes back has left before
        "compute",
        ("copy", 5),
    ]
    arrived = [one[2] for one in back if one[1] == "event"]
    compute = [one for one in told if one[0] == "compute"]
    assert {one[2] for one in compute if one[1] == "waits for"} == set(arrived)
    assert not [one for one in told if one[1] == "uses"]  # the compute stream's own memory


def test_a_layer_that_leaves_is_waited_for_when_the_next_one_has_run(
    told: list[tuple[Any, ...]],
) -> None:
    """The host is ahead of the device; without that wait all layers would hold their memory."""
    layers, offload = _layers(3), HostOffload(_Stream("copy", "cpu", told))
    hidden, events = _input(), []
    for layer in layers:
        told.clear()
        with offload.saving(layer.parameters()):
            hidden = layer(hidden)
        waits = [one[2] for one in told if one[:2] == ("compute", "waits for")]
        assert waits == events
        events = [one[2] for one in told if one[1] == "event"]
        assert len(events) == 2
    assert [copy.leaving is None for one in offload._layers for copy in one.copies.values()] == [
        *(True,) * 4,
        *(False,) * 2,  # the last one, until the stage has settled
    ]


def test_what_was_brought_back_in_vain_is_waited_for_before_its_memory_is_free(
    told: list[tuple[Any, ...]],
) -> None:
    offload = HostOffload(_Stream("copy", "cpu", told))
    loss = _run(_layers(1), offload, _input()).sum()
    offload.prefetch()
    arrived = {one[2] for one in told[-8:] if one[1] == "event"}
    told.clear()
    offload.finish()
    assert {one[2] for one in told if one[:2] == ("compute", "waits for")} == arrived
    del loss


def test_what_lies_on_the_host_stays_there_where_the_device_is_another() -> None:
    """A scalar on the CPU, say: it can be neither recorded on a stream nor is it in the way."""
    layers, hidden = _layers(), _input()
    torch.nn.Sequential(*layers)(hidden).sum().backward()
    expected = hidden.grad
    hidden = _input()
    offload = HostOffload(_Stream("copy", "cuda", []))
    _run(layers, offload, hidden).sum().backward()
    assert offload.host_bytes == 0
    assert expected is not None
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, expected)


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
