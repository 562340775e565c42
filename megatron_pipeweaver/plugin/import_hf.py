"""A Hugging Face checkpoint as a checkpoint of Megatron: `torch_dist`, for ``--load``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.hugging_face import HuggingFaceModel, read_model
from megatron_pipeweaver.models.hugging_face_weights import SafetensorsFolder, load_parameters
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.plugin.install import run_on_cpu
from megatron_pipeweaver.plugin.providers import WholeModel

_RELEASE = "release"
"""Megatron's name for weights without a training's state, which it begins at iteration 0."""


def import_checkpoint(folder: Path, out: Path, dtype: torch.dtype) -> HuggingFaceModel:
    """Write `folder`'s model to `out`, in a process without Megatron.

    Args:
        folder: of the Hugging Face checkpoint.
        out: a new folder, or an empty one.
        dtype: of the parameters that are written.

    Returns:
        What the model is.

    Raises:
        ConfigError: `out` holds something, or the checkpoint cannot be imported.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty; name a new folder")
    model = read_model(folder)
    tensors = SafetensorsFolder(folder)
    with _one_process() as groups:
        write_checkpoint(model, tensors, out, dtype, groups)
    return model


def write_checkpoint(
    model: HuggingFaceModel,
    tensors: SafetensorsFolder,
    out: Path,
    dtype: torch.dtype,
    groups: ProcessGroupCollection,
) -> None:
    """Write `model`, with the values of `tensors`, to `out`; one process does so alone."""
    options = replace(model.options, params_dtype=dtype)
    layout = make_layout(model.spec, 1, {})
    chunks = build_chunks(model.spec, layout, options, pg_collection=groups)
    load_parameters(chunks, model, tensors)
    place = out / _RELEASE
    place.mkdir(parents=True)
    state = {"checkpoint_version": 3.0, "iteration": 0}
    state["model"] = WholeModel(chunks).sharded_state_dict()
    dist_checkpointing.save(state, str(place))
    (out / "latest_checkpointed_iteration.txt").write_text(_RELEASE)


@contextlib.contextmanager
def _one_process() -> Iterator[ProcessGroupCollection]:
    """Megatron's parallel state with this process alone, on the CPU where there is no GPU."""
    on_cpu = run_on_cpu()
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        on_cpu.restore()
