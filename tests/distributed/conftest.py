"""Jobs that several files ask for run once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_on_ranks
from tests.distributed.jobs import CONFIG, RUNS
from tests.distributed.pretraining import ENVIRONMENT, Heard, train
from tests.photographs import make_dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """What the last rank, which makes the loss in every layout, heard of each job of `RUNS`.

    `directory` holds what they wrote.
    """

    heard: Mapping[str, Heard]
    directory: Path


_JOBS_A_START = 8


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs, one after the other on four ranks, which start up anew every so many jobs.

    A process keeps process groups of its earlier jobs, whose threads poll.
    """
    if find_spec("megatron.training") is None:
        pytest.skip("this megatron-core has no megatron.training")
    pytest.importorskip("psutil", reason="Megatron writes checkpoints with psutil")
    pytest.importorskip("tensorboard", reason="Megatron writes numbers with it")
    directory = tmp_path_factory.mktemp("jobs")
    (directory / "pipeweaver.json").write_text(CONFIG)
    make_qwen2_vl(directory)
    make_dataset(directory / "photographs")
    names, heard = list(RUNS), {}
    for first in range(0, len(names), _JOBS_A_START):
        runs = {name: RUNS[name] for name in names[first : first + _JOBS_A_START]}
        heard |= run_on_ranks(train, 4, runs, directory, deadline_s=420, environment=ENVIRONMENT)[
            -1
        ]
    return Jobs(heard=heard, directory=directory)


def make_qwen2_vl(directory: Path) -> None:
    """A small Qwen2-VL of random weights, and what is imported of it."""
    from megatron_pipeweaver.plugin.import_hf import import_checkpoint
    from tests.unit.models.checkpoints import qwen2_vl, save_random

    theirs = save_random(qwen2_vl(tie_word_embeddings=True), directory / "qwen2_vl")
    import_checkpoint(theirs, directory / "qwen2_vl-imported", torch.float32)
