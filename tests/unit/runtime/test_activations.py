"""The activation meter counts storages, lets go with the graph, and leaves gradients alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_pipeweaver.runtime.activations import ActivationMeter, AllocatorGauge

EIGHT = 8  # bytes of a float64


def _layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16, dtype=torch.float64), torch.nn.Tanh()] * 3
    return torch.nn.Sequential(*layers)


def _input() -> Tensor:
    return torch.linspace(-1, 1, 4 * 16, dtype=torch.float64).reshape(4, 16).requires_grad_()


def test_saved_bytes_are_held_until_the_backward_and_gradients_stay_the_same() -> None:
    model, x = _layers(), _input()
    model(x).sum().backward()
    expected = [each.grad for each in (x, *model.parameters())]
    model.zero_grad()
    y = _input()
    meter = ActivationMeter(model.parameters())
    with meter.recording():
        loss = model(y).sum()
    # The input of each linear layer and the output of each tanh: one storage where they meet.
    assert meter.held_bytes == meter.peak_bytes == 4 * (4 * 16) * EIGHT
    loss.backward()
    found = [each.grad for each in (y, *model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert meter.held_bytes == 0


def test_a_graph_that_is_dropped_releases_what_it_held() -> None:
    model, x = _layers(), _input()
    meter = ActivationMeter(model.parameters())
    with meter.recording():
        first = model(x)
        second = model(x)
    both = meter.held_bytes
    del first
    assert 0 < meter.held_bytes < both
    del second
    assert meter.held_bytes == 0
    assert meter.peak_bytes == both


def test_a_checkpointed_forward_holds_less() -> None:
    model, x = _layers(), _input()
    kept, lean = ActivationMeter(model.parameters()), ActivationMeter(model.parameters())
    with kept.recording():
        loss = model(x).sum()
    with lean.recording():
        other = checkpoint(model, x, use_reentrant=False).sum()
    assert lean.held_bytes < kept.held_bytes
    loss.backward()
    other.backward()
    assert kept.held_bytes == lean.held_bytes == 0


def test_the_allocator_is_asked_for_what_it_gave_out_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played by numbers: what was there before does not count, nor does an earlier peak."""
    given = {"now": 100, "most": 900}
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: given.update(most=given["now"])
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: given["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: given["most"])
    gauge = AllocatorGauge()
    assert gauge.peak_bytes == 0
    with gauge.recording():
        given.update(now=340, most=350)
    gauge.note([torch.zeros(1000)])  # the allocator knows of it
    given.update(now=40)
    assert gauge.peak_bytes == 250
    assert AllocatorGauge().peak_bytes == 0
