"""megatron-core on one CPU process, whose chunks stand in for those of any rank."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_pipeweaver.plugin.install import run_on_cpu


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with run_on_cpu():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        dist.destroy_process_group()


@pytest.fixture
def groups(one_process: None) -> Any:
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(0)
    return ProcessGroupCollection.use_mpu_process_groups()
