"""The scripts that compare predictions with real layers and with published runs still work."""

import argparse
from pathlib import Path

import pytest

from megatron_pipeweaver.semu.devices import load_device

run = pytest.importorskip("benchmarks.semu_accuracy.run")
peers = pytest.importorskip("benchmarks.semu_peers.run")


def test_the_comparison_runs_on_a_cpu_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(device="cpu", base=None, repeats=1, small=True, output=None)
    text = run.report(arguments)
    for strategy in run.STRATEGIES["cpu"]:
        for name in ("vision", "language", "diffusion"):
            assert f"- time, {strategy}, {name}: " in text
    kept = text.rpartition("**memory: ")[2].partition("%")[0]
    assert float(kept) > 97
    assert not capsys.readouterr().out


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
