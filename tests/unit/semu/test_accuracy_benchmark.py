"""The scripts that compare predictions with real layers and with published runs still work."""

import argparse
from pathlib import Path

import pytest

from megatron_pipeweaver.semu.devices import load_device

run = pytest.importorskip("benchmarks.semu_accuracy.run")
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


def test_published_a100_runs_are_met_within_a_sixth() -> None:
    # The two smaller models; the whole table takes seconds.
    errors = peers.errors_of(peers.ROWS[:2], load_device("A100"))
    assert len(errors) == 4
    assert max(map(abs, errors)) < 1 / 6
