"""The scripts that compare predictions with real layers and with published runs still work."""

import argparse
from pathlib import Path

import pytest

from megatron_pipeweaver.semu.devices import load_device

run = pytest.importorskip("benchmarks.semu_accuracy.run")
probes = pytest.importorskip("megatron_pipeweaver.semu.probes")
work = pytest.importorskip("benchmarks.semu_accuracy.work")
peers = pytest.importorskip("benchmarks.semu_peers.run")


def test_the_comparison_runs_on_a_cpu_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(device="cpu", base=None, repeats=1, small=True, output=None)
    text = run.report(arguments)
    rows = {
        (strategy, f"{what} {module}" if what == "whole" else f"{module} {what}")
        for strategy in run.STRATEGIES["cpu"]
        for module in ("vision", "language", "diffusion")
        for what in ("layers", "whole")
    }
    cells = [tuple(line.split(" | ")) for line in text.splitlines() if line.startswith("| ")]
    assert all(sum(row[:2] == (f"| {one}", name) for row in cells) == 2 for one, name in rows)
    # Memory is the same on a busy machine: what is kept, and the most at once.
    kept, peak = (
        float(text.rpartition(what)[2].partition("%")[0]) for what in ("kept: ", "peak memory: ")
    )
    assert kept > 99
    assert peak > 98.5
    assert not capsys.readouterr().out


def test_what_operators_make_is_weighed_while_it_lives() -> None:
    torch = run.torch
    with work.TensorMemory() as memory:
        one = torch.ones(256)
        other = one + one
        assert memory.held_bytes() == 2048
        view = other.view(2, 128)
        other.add_(1)
        assert memory.held_bytes() == 2048
        del other, one
        assert memory.held_bytes() == 1024
        view.untyped_storage().resize_(0)
        assert memory.held_bytes() == 0
    assert memory.peak_bytes == 2048


def test_without_a_gpu_it_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    output = tmp_path / "table.md"
    monkeypatch.setattr(run.sys, "argv", ["run", "--device", "cuda", "-o", str(output)])
    assert run.main() == 2
    told = capsys.readouterr()
    assert told.err == ("semu_accuracy: this machine has no CUDA device; use --device cpu\n")
    assert not told.out
    assert not output.exists()


class PlayedDevice:
    """A GPU that is `lag` nanoseconds behind its host, and an allocator of two tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
        self.now, self.lag, self.allocated, self.peak = 0, lag, 0, 0
        monkeypatch.setattr(work.time, "perf_counter_ns", lambda: self.now)
        monkeypatch.setattr(probes.time, "perf_counter_ns", lambda: self.now)
        for name, found in (
            ("synchronize", self.synchronize),
            ("memory_allocated", lambda: self.allocated),
            ("max_memory_allocated", lambda: self.peak),
            ("reset_peak_memory_stats", self.reset),
        ):
            monkeypatch.setattr(run.torch.cuda, name, found)

    def synchronize(self) -> None:
        self.now += self.lag

    def reset(self) -> None:
        self.peak = self.allocated

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


class PlayedChunk(work.Chunk):
    """A host that issues its work in 100 ns."""

    def __init__(self, device: PlayedDevice) -> None:
        super().__init__("cpu")
        self.device, self.played = "cuda", device

    def load(self, size):
        raise NotImplementedError

    def parameters(self, size):
        return iter(())

    def made(self, size, strategy, offload=None):
        def forward():
            self.played.now += 100
            return run.torch.ones(4, requires_grad=True) * 2

        return work.Pass(run=forward, owned=())


@pytest.mark.parametrize(("lag", "host"), [(0, True), (1, True), (50, False)])
def test_chunks_whose_gpu_waits_for_the_host_are_named(
    monkeypatch: pytest.MonkeyPatch, lag: int, host: bool
) -> None:
    device = PlayedDevice(monkeypatch, lag)
    chunk = PlayedChunk(device)
    chunk.name = "played"
    clock = probes.Clock(run.torch.cuda.synchronize)
    timed = run.Timed(chunk, (4, 1))
    timed.times.extend(chunk.times((4, 1), timed.strategy, clock) for _ in range(3))
    assert timed.forward_ns() == 100 + lag
    assert timed.bound_by_host() is host
    assert run.host_bound_lines([timed]) == (
        ["- bound by the host, not the GPU: keep played 4 x 1"] if host else []
    )


def test_the_allocator_is_asked_for_what_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    device = PlayedDevice(monkeypatch, 0)
    device.take(1000)  # weights; and a peak of before
    device.take(500)
    device.take(-500)
    memory = work.CudaMemory()
    device.take(70)
    device.take(200)
    device.take(-200)
    assert (memory.held_bytes(), memory.peak_bytes()) == (70, 270)


def test_published_a100_runs_are_met_within_a_sixth() -> None:
    # The two smaller models; the whole table takes seconds.
    errors = peers.errors_of(peers.ROWS[:2], load_device("A100"))
    assert len(errors) == 4
    assert max(map(abs, errors)) < 1 / 6
