"""The projector: an encoder's width into the width of the module that consumes it."""

from __future__ import annotations

from typing import Any

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.models.configs import projector_config
from megatron_pipeweaver.models.options import ModelOptions


def build_projector(module: ModuleSpec, options: ModelOptions, groups: Any) -> Any:
    """Megatron's two-layer projector from `module`'s folded patches into its `output_size`."""
    return MultimodalProjector(
        projector_config(module, options),
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        "mlp",
        module.hidden_size * module.patches_per_token,
        tp_group=groups.tp,
    )
