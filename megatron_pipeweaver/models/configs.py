"""Megatron's `TransformerConfig` of modules, chunks and the whole model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkLayout, ChunkPlace, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.models.options import ModelOptions


class ChunkLayers(PipelineParallelLayerLayout):  # type: ignore[misc]
    """A module's cut as one of its chunks sees it.

    Megatron's own layout looks up its rank in the global parallel state; this one knows which
    chunk it belongs to, so that any rank's chunks can be built anywhere.
    """

    def __init__(self, layout: ModuleLayout, place: ChunkPlace) -> None:
        super().__init__(
            [["decoder"] * layers for layers in layout.layers],
            len(layout.layers) // layout.segments,
        )
        self._place = place

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """The layers of the chunk."""
        del vp_stage, pp_rank
        return self._place.layers if layer_type is LayerType.decoder else 0

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """The layers of the module in front of the chunk."""
        del vp_stage, pp_rank
        return self._place.first_layer if layer_type is LayerType.decoder else 0


def root_config(model: ModelSpec, layout: ChunkLayout, options: ModelOptions) -> Any:
    """The config that all chunks of a rank share, and that Megatron writes its hooks on.

    It is the backbone's, in the coordinates of the whole pipeline.
    """
    config = _make_config(model.backbone.name, _fields(model.backbone, options), options)
    config.pipeline_model_parallel_size = layout.pipeline_size
    if layout.pipeline_size > 1:
        config.virtual_pipeline_model_parallel_size = layout.virtual_size
        # Megatron's default; its own interleaved schedule, where it runs these chunks, reads it.
        config.microbatch_group_size_per_vp_stage = layout.pipeline_size
    return config


def chunk_config(
    module: ModuleSpec, layout: ModuleLayout, place: ChunkPlace, options: ModelOptions
) -> Any:
    """The config of a chunk's inner modules, in the coordinates of its own module."""
    config = _make_config(module.name, _fields(module, options), options)
    pipeline_size = len(layout.layers) // layout.segments
    if pipeline_size > 1:
        # Set behind the constructor, which wants every stage to have as many layers.
        config.pipeline_model_parallel_size = pipeline_size
        config.virtual_pipeline_model_parallel_size = layout.segments
        config.pipeline_model_parallel_layout = ChunkLayers(layout, place)
    return config


def projector_config(module: ModuleSpec, options: ModelOptions) -> Any:
    """The config of the projector behind `module`: its widths are those of the output."""
    fields = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": module.output_size,
        "ffn_hidden_size": module.projector_hidden_size or module.output_size,
    }
    return _make_config(f"{module.name}_projection", fields, options)


def _fields(module: ModuleSpec, options: ModelOptions) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_layers": module.layers,
        "hidden_size": module.hidden_size,
        "ffn_hidden_size": module.ffn_hidden_size,
        "num_attention_heads": module.attention_heads,
        "num_query_groups": module.kv_groups,
        "hidden_dropout": options.dropout,
        "attention_dropout": options.dropout,
    }
    if module.gated_mlp:
        fields |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if module.kind is ModuleKind.DIFFUSION:
        fields["qk_layernorm"] = module.layer.qk_norm
    if module.kind is ModuleKind.LANGUAGE:
        fields |= _attention_fields(module, options)
    experts = module.layer.experts
    if experts is not None:
        fields |= {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.active,
            "moe_ffn_hidden_size": experts.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
            "moe_layer_freq": [int(experts.holds(layer)) for layer in range(module.layers)],
        }
    return fields


def _attention_fields(module: ModuleSpec, options: ModelOptions) -> dict[str, Any]:
    """What a language model's attention has besides heads."""
    fields: dict[str, Any] = {"qk_layernorm": module.layer.qk_norm}
    latent = module.layer.latent
    if latent is not None:
        fields |= {
            "multi_latent_attention": True,
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.kv_rank,
            "qk_head_dim": latent.head_size,
            "qk_pos_emb_head_dim": latent.rotary_size,
            "v_head_dim": latent.value_size,
            "rope_type": "rope",
            "rotary_base": options.rotary_base,
        }
    return fields


def _make_config(name: str, fields: dict[str, Any], options: ModelOptions) -> Any:
    """A config of one pipeline rank; `overrides` win over `common`, both over PipeWeaver's."""
    overrides = options.overrides.get(name, {})
    latent = fields.get("multi_latent_attention", False)
    kind = MLATransformerConfig if latent else TransformerConfig
    known = kind.__dataclass_fields__
    unknown = sorted({*options.common, *overrides} - set(known))
    if unknown:
        raise ConfigError(f"module {name!r}: {kind.__name__} has no fields {unknown}")
    given = {
        "params_dtype": options.params_dtype,
        "pipeline_dtype": options.params_dtype,
        "bf16": options.params_dtype is torch.bfloat16,
        "fp16": options.params_dtype is torch.float16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "masked_softmax_fusion": find_spec("scaled_masked_softmax_cuda") is not None,
        "deallocate_pipeline_outputs": True,
        **fields,
        **options.common,
        **overrides,
    }
    try:
        config = kind(**given)
    except ValueError as error:
        raise ConfigError(f"module {name!r}: {error}") from error
    if config.gradient_accumulation_fusion:
        # Transformer Engine has the gradient of what ran forward first written over `main_grad`,
        # and here another one's backward may have come before. Without its cache nothing is first.
        config.disable_parameter_transpose_cache = True
    return config
