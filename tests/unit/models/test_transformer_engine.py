"""Chunks of Transformer Engine's layers, in a process whose Megatron finds it."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def test_weight_gradients_are_put_off_as_transformer_engine_does_it():
    cases = str((HERE / "engine_cases.py").relative_to(ROOT))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.unit.models.engine", cases]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
