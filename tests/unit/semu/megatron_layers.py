"""Real megatron-core layers on the CPU, and what they compute and keep."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when megatron-core is imported

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_pipeweaver.models.latent_attention import own_latent_attention
from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import PatchSet
from megatron_pipeweaver.semu.architecture import LayerSpec


@dataclass(frozen=True)
class Measured:
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    parameters: int


class FlopCount(TorchDispatchMode):
    """What `FlopCounterMode` counts, without its module hooks, which recomputation deadlocks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def experts_without_transformer_engine() -> Iterator[None]:
    """Both versions leave out the `None` that their router asks for."""
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(moe_utils, "te_general_gemm"):
            patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        yield


@contextmanager
def one_rank() -> Iterator[None]:
    """megatron-core's parallel state with this process alone."""
    with experts_without_transformer_engine(), PatchSet(cpu_patches()):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel(1, 1)
            model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def make_layer(
    spec: LayerSpec,
    *,
    dropout: float = 0.0,
    recompute: list[str] | None = None,
    module: type[torch.nn.Module] = TransformerLayer,
    as_megatron_has_it: bool = False,
) -> torch.nn.Module:
    """megatron-core's own layer for `spec`, in single precision; `module` is its class.

    Latent attention gets the core attention that it lacks without Transformer Engine, but
    `as_megatron_has_it`.
    """
    selective = {"recompute_granularity": "selective", "recompute_modules": recompute}
    gated = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    experts = {}
    if spec.experts is not None:
        experts = {
            "num_moe_experts": spec.experts.count,
            "moe_router_topk": spec.experts.active,
            "moe_ffn_hidden_size": spec.experts.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": spec.experts.shared_ffn_hidden_size,
            "moe_token_dispatcher_type": "alltoall",
        }
    kind, latent = TransformerConfig, {}
    if spec.latent is not None:
        kind = MLATransformerConfig
        latent = {
            "q_lora_rank": spec.latent.query_rank,
            "kv_lora_rank": spec.latent.kv_rank,
            "qk_head_dim": spec.latent.head_size,
            "qk_pos_emb_head_dim": spec.latent.rotary_size,
            "v_head_dim": spec.latent.value_size,
            "rope_type": "rope",
        }
    windowed = spec.causal and spec.window is not None
    config = kind(
        num_layers=1,
        window_size=(spec.window - 1, 0) if windowed else None,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_groups,
        kv_channels=spec.head_size,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        add_bias_linear=spec.bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        normalization="RMSNorm" if spec.rms_norm else "LayerNorm",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        **(gated if spec.gated_mlp else {}),
        **(selective if recompute else {}),
        **experts,
        **latent,
    )
    if spec.causal:
        layer_spec = get_gpt_layer_local_spec(
            num_experts=spec.experts.count if spec.experts else None,
            qk_layernorm=spec.qk_norm,
            normalization="RMSNorm" if spec.rms_norm else None,
            multi_latent_attention=bool(latent),
        )
        if latent and not as_megatron_has_it:
            parts = layer_spec.submodules
            attention = own_latent_attention(parts.self_attention)
            layer_spec = replace(layer_spec, submodules=replace(parts, self_attention=attention))
    else:
        layer_spec = get_vit_layer_with_local_spec()
    layer = build_module(replace(layer_spec, module=module), config=config, layer_number=1)
    return layer.train()


def measure(
    layer: torch.nn.Module,
    sequence: int,
    batch: int,
    *,
    rotary: bool = False,
    recompute: bool = False,
) -> Measured:
    """What a layer does over random hidden states."""
    config = layer.config
    hidden = torch.randn(sequence, batch, config.hidden_size).requires_grad_(True)
    mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1)
    angles = torch.randn(sequence, 1, 1, config.kv_channels) if rotary else None

    def run(states: torch.Tensor) -> torch.Tensor:
        return layer(states, attention_mask=mask, rotary_pos_emb=angles)[0]

    return observe(layer, run, hidden, given=[mask], recompute=recompute)


def observe(
    layer: torch.nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    *,
    given: Sequence[torch.Tensor],
    recompute: bool = False,
) -> Measured:
    """Matrix FLOPs, and bytes kept in storages that are neither parameters nor `given`.

    What is freed again within the forward, to be made anew in the backward, is not kept.
    """
    ignored = {one.untyped_storage().data_ptr() for one in (*given, *layer.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            # Held here, so that no later storage can take the same address.
            kept[storage.data_ptr()] = tensor.detach()
        return tensor.detach()

    with (
        FlopCount() as forward,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = checkpoint(run, False, hidden) if recompute else run(hidden)
    saved_bytes = sum(one.untyped_storage().nbytes() for one in kept.values())
    with FlopCount() as backward:
        output.sum().backward()
    return Measured(
        forward_flops=forward.total,
        backward_flops=backward.total,
        saved_bytes=saved_bytes,
        parameters=sum(one.numel() for one in layer.parameters()),
    )
