import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import PatchSet

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works by itself here")


@pytest.fixture
def on_cpu():
    with PatchSet(cpu_patches()) as patches:
        yield patches


def test_everything_is_put_back():
    absent = object()
    before = {
        (id(one.target), one.name): getattr(one.target, one.name, absent) for one in cpu_patches()
    }
    inherited = "to" in vars(torch.Tensor)
    with PatchSet(cpu_patches()):
        assert torch.cuda.current_device() == torch.device("cpu")
    for one in cpu_patches():
        found = getattr(one.target, one.name, absent)
        assert found is before[id(one.target), one.name], one.name
    assert ("to" in vars(torch.Tensor)) == inherited


def test_no_patches_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_patches() == []


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_tensors_for_a_gpu_land_on_the_cpu(on_cpu, device):
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.ones_like(torch.zeros(2), device=device).device.type == "cpu"
    moved = torch.zeros(2).to(device)
    assert moved.device.type == "cpu"
    assert torch.zeros(2).to(device=device, dtype=torch.float64).dtype == torch.float64


def test_other_conversions_are_untouched(on_cpu):
    one = torch.zeros(2)
    assert one.to(torch.float64).dtype == torch.float64
    assert one.to(torch.empty(1, dtype=torch.int32)).dtype == torch.int32
    assert one.type(torch.float16).dtype == torch.float16
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_cuda_and_pinning_change_nothing(on_cpu):
    one, layer = torch.zeros(2), torch.nn.Linear(1, 1)
    assert one.cuda(non_blocking=True) is one
    assert one.pin_memory() is one
    assert torch.tensor([1], device="cuda", pin_memory=True).tolist() == [1]
    assert layer.cuda() is layer


def test_type_names_are_cuda_names(on_cpu):
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"


def test_streams_and_events_do_nothing_and_tell_time(on_cpu):
    stream = torch.cuda.Stream()
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        first.record()
        second.record(torch.cuda.current_stream())
    stream.wait_event(second)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert first.query()
    assert first.elapsed_time(second) >= 0
    assert torch.cuda.memory_allocated() == 0


def test_tracked_random_state_is_apart_from_the_surrounding_one(on_cpu):
    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(5)
    tracker.add("model-parallel-rng", 7)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    outside = torch.rand(3, generator=torch.Generator().manual_seed(5))
    with tracker.fork():
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), outside)
    with tracker.fork():
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), expected)
    with pytest.raises(KeyError, match="other"), tracker.fork("other"):
        pass


def test_setting_random_state_queues_nothing(on_cpu):
    tracker = megatron_random.CudaRNGStatesTracker()
    queued = len(torch.cuda._queued_calls)
    tracker.add("model-parallel-rng", 7)
    with tracker.fork():
        pass
    torch.manual_seed(3)
    assert len(torch.cuda._queued_calls) == queued
