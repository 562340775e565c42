"""What only a device with streams and an allocator can show of memory strategies."""

from __future__ import annotations

import pytest
import torch

from megatron_pipeweaver.runtime.activations import AllocatorGauge
from megatron_pipeweaver.runtime.offload import HostOffload, copy_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
LAYERS, ROWS, WIDTH = 6, 4096, 2048
ACTIVATION_BYTES = ROWS * WIDTH * 4


def _layers() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [
        torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()).cuda()
        for _ in range(LAYERS)
    ]


def _train(offload: HostOffload | None) -> tuple[list[torch.Tensor], int, int]:
    """Gradients, and what the allocator had given out behind the forward and at most."""
    layers = _layers()
    hidden = torch.randn(ROWS, WIDTH, device="cuda").requires_grad_()
    gauge = AllocatorGauge()
    for layer in layers:
        if offload is None:
            hidden = layer(hidden)
        else:
            with offload.saving(layer.parameters()):
                hidden = layer(hidden)
    loss = hidden.sum()
    del hidden
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    if offload is not None:
        offload.prefetch()
    loss.backward()
    torch.cuda.synchronize()
    if offload is not None:
        offload.finish()
    gradients = [one.grad for layer in layers for one in layer.parameters() if one.grad is not None]
    return gradients, held, gauge.peak_bytes


def test_offloaded_layers_leave_the_device_and_gradients_stay_the_same() -> None:
    kept, kept_held, _ = _train(None)
    torch.cuda.empty_cache()
    moved, moved_held, _ = _train(HostOffload(copy_stream()))
    assert len(kept) == len(moved) == 2 * LAYERS
    assert all(map(torch.equal, kept, moved))
    assert kept_held - moved_held >= (LAYERS - 2) * ACTIVATION_BYTES


def test_copies_run_beside_compute() -> None:
    stream = copy_stream()
    assert stream is not None
    offload = HostOffload(stream)
    (layer,) = _layers()[:1]
    hidden = torch.randn(ROWS, WIDTH, device="cuda").requires_grad_()
    with offload.saving(layer.parameters()):
        hidden = layer(hidden)
    copied = stream.record_event()
    before = torch.cuda.Event()
    before.record()  # on the compute stream: it is not behind the copies
    before.synchronize()
    assert offload.host_bytes >= ACTIVATION_BYTES
    copied.synchronize()
    hidden.sum().backward()
