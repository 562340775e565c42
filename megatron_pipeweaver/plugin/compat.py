"""megatron-core's versions behind functions of one signature.

What differs between 0.16.1 and 0.19.2 as far as PipeWeaver calls it: ``backward_step`` lost its
`model_type`, and later versions want more groups when gradients are finalised.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model

from megatron_pipeweaver.errors import UnsupportedMegatronError

OLDEST = (0, 16, 1)
"""The oldest megatron-core release that PipeWeaver runs with."""
FIRST_UNKNOWN = (0, 20, 0)
"""The first release behind those that it is known to run with."""

_BACKWARD_STEPS: Mapping[tuple[str, ...], tuple[ModelType, ...]] = {
    ("input_tensor", "output_tensor", "output_tensor_grad", "model_type", "config"): (
        ModelType.encoder_or_decoder,
    ),
    ("input_tensor", "output_tensor", "output_tensor_grad", "config"): (),
}
"""What stands between the gradient and the config, by the signature's parameters."""

_GROUPS: Mapping[str, Callable[[], Any]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "embd": lambda: parallel_state.get_embedding_group(check_initialized=False),
    "pos_embd": lambda: parallel_state.get_position_embedding_group(check_initialized=False),
    "dp": parallel_state.get_data_parallel_group,
    "dp_cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp_dp_cp": lambda: parallel_state.get_tensor_and_data_parallel_group(
        with_context_parallel=True
    ),
}
"""The groups that Megatron's schedules fall back to, by their name in the collection."""


def check_version(found: str = megatron.core.__version__) -> None:
    """Refuse a megatron-core that PipeWeaver does not know.

    Raises:
        UnsupportedMegatronError: too old, too new, or with other functions than that version has.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not OLDEST <= numbers < FIRST_UNKNOWN:
        raise UnsupportedMegatronError(
            f"megatron-core {found}: PipeWeaver runs with {_dotted(OLDEST)} up to, not including, "
            f"{_dotted(FIRST_UNKNOWN)}; install one of those"
        )
    if _backward_step_parameters() not in _BACKWARD_STEPS:
        raise UnsupportedMegatronError(
            f"megatron-core {found}: schedules.backward_step takes {_backward_step_parameters()}, "
            "which no known release does; install an unchanged megatron-core"
        )


def forward_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: torch.nn.Module,
    num_microbatches: int,
    input_tensor: list[torch.Tensor | None],
    forward_data_store: list[Any],
    config: Any,
    cp_group_size: int,
    *,
    collect_non_loss_data: bool = False,
    is_first_microbatch: bool = False,
    current_microbatch: int | None = None,
    vp_stage: int | None = None,
    is_last_stage: bool = True,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Megatron's forward step of one chunk, its loss function and loss division included.

    Returns:
        The output in a list of one, and the number of tokens (zero but for a per-token loss).
    """
    output, num_tokens = schedules.forward_step(
        forward_step_func,
        data_iterator,
        model,
        num_microbatches,
        input_tensor,
        forward_data_store,
        config,
        cp_group_size,
        collect_non_loss_data=collect_non_loss_data,
        is_first_microbatch=is_first_microbatch,
        current_microbatch=current_microbatch,
        vp_stage=vp_stage,
        is_last_stage=is_last_stage,
    )
    return output, num_tokens


def backward_step(
    input_tensor: Sequence[torch.Tensor | None],
    output_tensor: torch.Tensor,
    output_tensor_grad: torch.Tensor | None,
    config: Any,
) -> list[torch.Tensor | None]:
    """Megatron's backward step of one chunk, loss scaling included.

    Args:
        input_tensor: what the forward took; ``[None]`` where it took nothing.
        output_tensor: the end of its graph.
        output_tensor_grad: `None` for a loss, and only there.
        config: the chunks' common `TransformerConfig`.

    Returns:
        The gradient of every input.
    """
    between = _BACKWARD_STEPS[_backward_step_parameters()]
    grads: list[torch.Tensor | None] = schedules.backward_step(
        list(input_tensor), output_tensor, output_tensor_grad, *between, config
    )
    return grads


def deallocate_output_tensor(output: torch.Tensor, deallocate: bool) -> None:
    """Let go of an output's memory and keep its graph, if `deallocate`."""
    schedules.deallocate_output_tensor(output, deallocate)


def default_pg_collection() -> Any:
    """The groups that Megatron's schedules use when they are called without any."""
    groups = ProcessGroupCollection()
    for name, group in _GROUPS.items():
        setattr(groups, name, group())
    return groups


def finalize_order(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """`chunks` in the order in which ``finalize_model_grads`` wants them.

    It sums the gradients of tied embeddings over the first chunk of the first rank and the last
    chunk of the last rank, so the chunk with the embedding goes in front of the encoders' chunks.
    The one with the output layer is last already, as its module is.
    """
    return sorted(chunks, key=lambda chunk: not get_attr_wrapped_model(chunk, "embeds_tokens"))


def _backward_step_parameters() -> tuple[str, ...]:
    return tuple(inspect.signature(schedules.backward_step).parameters)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
