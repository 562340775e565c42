"""Parameters by their name in the whole model: names and values do not depend on the cut."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_pipeweaver.models.chunk import ModelChunk

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
"""Weights whose output is added to the residual stream, once per layer."""


def global_name(chunk: ModelChunk, name: str) -> str:
    """The name of the chunk's parameter `name` in the whole model.

    Layers are counted from the start of their module, experts from the first expert-parallel rank:
    ``language_model.decoder.layers.0.mlp.linear_fc1.weight`` of a chunk that begins with layer 4
    is ``language_model.decoder.layers.4.mlp.linear_fc1.weight``.
    """
    name = _LAYER.sub(lambda match: str(int(match[0]) + chunk.place.first_layer), name)
    return _EXPERT.sub(lambda match: str(int(match[0]) + _first_expert(chunk)), name)


def _first_expert(chunk: ModelChunk) -> int:
    """The index of the first expert that this rank holds of every layer."""
    experts, group = chunk.module_spec.layer.experts, chunk.pg_collection.ep
    return 0 if experts is None else group.rank() * (experts.count // group.size())


def global_parameters(
    chunks: Sequence[ModelChunk],
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter of `chunks` with its global name, tied copies included."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield global_name(chunk, name), parameter


def initialize_by_name(chunks: Sequence[ModelChunk], seed: int) -> None:
    """Give every parameter the value that its name and `seed` determine.

    The same model gets the same values however it is cut, on whatever rank a layer stands; both
    copies of a tied embedding are equal without communication. Matrices are normal with the
    config's `init_method_std` (embeddings, `embedding_init_method_std`), those in front of a
    residual sum scaled down by the module's depth (GPT-2), convolutions by their fan-in; biases
    are zero, norms one.

    Args:
        chunks: any chunks of one model.
        seed: any integer.
    """
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                key = tied_name(chunk, global_name(chunk, name))
                parameter.copy_(_initial_value(chunk, key, parameter, seed))


def tied_name(chunk: ModelChunk, name: str) -> str:
    """`name`, or that of the embedding where `name` is its copy in the output layer."""
    if not chunk.share_embeddings_and_output_weights:
        return name
    return re.sub(r"output_layer\.weight$", "embedding.word_embeddings.weight", name)


def _initial_value(chunk: ModelChunk, key: str, parameter: Tensor, seed: int) -> Tensor:
    if key.endswith("bias"):
        return torch.zeros_like(parameter)
    if parameter.dim() == 1:
        return torch.ones_like(parameter)
    shape = list(parameter.shape)
    group = _tensor_group(chunk, key)
    split = getattr(parameter, "tensor_model_parallel", False) and group.size() > 1
    if split:
        shape[_partition_dim(parameter)] *= group.size()
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    # Sampled in one type, so that a model in another type starts from the same values.
    value = torch.randn(shape, generator=generator) * _deviation(chunk, key, shape)
    if split:
        value = _shard(value, key, parameter, chunk)
    return value


def _deviation(chunk: ModelChunk, key: str, shape: Sequence[int]) -> float:
    if len(shape) > 2:
        return 1.0 / math.sqrt(math.prod(shape[1:]))
    deviation = float(chunk.config.init_method_std)
    if key.endswith("embedding.word_embeddings.weight"):
        return float(chunk.config.embedding_init_method_std)
    if key.endswith(_RESIDUAL) and ".layers." in key:
        deviation /= math.sqrt(2.0 * chunk.module_spec.layers)
    return deviation


def _shard(value: Tensor, key: str, parameter: Tensor, chunk: ModelChunk) -> Tensor:
    """This tensor-parallel rank's share of a whole matrix."""
    group, dim = _tensor_group(chunk, key), _partition_dim(parameter)
    # Megatron keeps the gate and the value of a gated MLP side by side on every rank.
    gated = chunk.module_spec.gated_mlp and ".layers." in key and "linear_fc1" in key
    parts = value.chunk(2, dim) if gated else (value,)
    return torch.cat([part.chunk(group.size(), dim)[group.rank()] for part in parts], dim)


def _tensor_group(chunk: ModelChunk, key: str) -> Any:
    """The ranks that hold parts of one matrix; experts have a group of their own."""
    groups = chunk.pg_collection
    return groups.expt_tp if _EXPERT.search(key) else groups.tp


def _partition_dim(parameter: Any) -> int:
    return int(parameter.partition_dim)
