"""megatron-core on one CPU process: models are built and run here without any pipeline."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import PatchSet


@pytest.fixture(scope="package")
def one_process() -> Iterator[None]:
    with PatchSet(cpu_patches()):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        dist.destroy_process_group()


@pytest.fixture
def groups(one_process: None) -> Any:
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(0)
    return ProcessGroupCollection.use_mpu_process_groups()
