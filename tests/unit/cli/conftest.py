from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_pipeweaver.ir.codec import problem_to_json
from tests.unit.ir.examples import problem


@pytest.fixture
def problem_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_bytes(problem_to_json(problem()))
    return path


@pytest.fixture
def infeasible_file(tmp_path: Path) -> Path:
    """Even at its leanest one microbatch holds more than rank 1 has."""
    path = tmp_path / "tight.json"
    path.write_bytes(problem_to_json(replace(problem(), memory_capacity_bytes=(100, 2))))
    return path
