"""What of Megatron's arguments cannot work together with PipeWeaver's, each refused by its name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.arguments import PipeWeaverArguments


def _set(value: Any) -> bool:
    return bool(value)


_OWN_CUT = "PipeWeaver cuts the modules itself; use --pipeweaver-segments instead"
_NO_GRAPH = "every iteration has another schedule, which a graph cannot replay; leave it out"
_OWN_RECOMPUTATION = (
    "PipeWeaver chooses per pass which layers are recomputed; leave it out, and give "
    "--pipeweaver-strategies to say what a layer may recompute"
)
_OWN_ORDER = "it assumes Megatron's own order of microbatches; leave it out"
_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_layers_per_virtual_pipeline_stage": (_set, _OWN_CUT),
    "num_virtual_stages_per_pipeline_rank": (_set, _OWN_CUT),
    "pipeline_model_parallel_layout": (_set, _OWN_CUT),
    "decoder_first_pipeline_num_layers": (_set, _OWN_CUT),
    "decoder_last_pipeline_num_layers": (_set, _OWN_CUT),
    "account_for_embedding_in_pipeline_split": (_set, _OWN_CUT),
    "account_for_loss_in_pipeline_split": (_set, _OWN_CUT),
    "overlap_param_gather_with_optimizer_step": (_set, _OWN_ORDER),
    "overlap_moe_expert_parallel_comm": (_set, _OWN_ORDER),
    "hybrid_context_parallel": (_set, _OWN_ORDER),
    "defer_embedding_wgrad_compute": (_set, _OWN_ORDER),
    "fine_grained_activation_offloading": (_set, _OWN_ORDER),
    "delay_wgrad_compute": (_set, _OWN_ORDER),
    "recompute_granularity": (_set, _OWN_RECOMPUTATION),
    "recompute_activations": (_set, _OWN_RECOMPUTATION),
    "moe_layer_recompute": (_set, _OWN_RECOMPUTATION),
    "cpu_offloading_num_layers": (
        _set,
        "PipeWeaver chooses per pass which layers are offloaded; leave it out, and give "
        "--pipeweaver-strategies keep,offload",
    ),
    "fp32_residual_connection": (
        _set,
        "stages hand on hidden states in the type of the parameters; leave it out",
    ),
    "mlp_chunks_for_training": (
        lambda value: value not in (None, 1),
        "PipeWeaver's strategies run an MLP as a whole; leave it out",
    ),
    "cuda_graph_impl": (lambda value: value not in (None, "none"), _NO_GRAPH),
    "enable_cuda_graph": (_set, _NO_GRAPH),
    "external_cuda_graph": (_set, _NO_GRAPH),
    "use_torch_fsdp2": (_set, "chunks are wrapped in Megatron's DDP; leave it out"),
    "use_megatron_fsdp": (_set, "chunks are wrapped in Megatron's DDP; leave it out"),
    "moe_use_upcycling": (_set, "chunks start with experts; leave it out"),
    "moe_latent_size": (_set, "chunks have no latent experts; leave it out"),
    "moe_enable_routing_replay": (_set, _OWN_ORDER),
    "moe_paged_stash": (_set, _OWN_ORDER),
    "mla_down_proj_fusion": (_set, "chunks have two down projections; leave it out"),
    "cache_mla_latents": (_set, "it is for inference; leave it out"),
    "mtp_num_layers": (_set, "chunks have no multi-token prediction; leave it out"),
}
"""Megatron's arguments that cannot work, by attribute: which values, and what to do instead."""


def check_combinations(args: argparse.Namespace, ours: PipeWeaverArguments) -> None:
    """Refuse Megatron arguments that cannot work together with PipeWeaver's.

    Raises:
        ConfigError: names the first such flag and what to change.
    """
    if args.pipeline_model_parallel_size < 2:
        raise ConfigError(
            "--pipeweaver: there is nothing to schedule on one pipeline rank; "
            "give --pipeline-model-parallel-size 2 or more, or leave --pipeweaver out"
        )
    for name, (refused, why) in _REFUSED.items():
        value = getattr(args, name, None)
        if refused(value):
            shown = "" if value is True else f" {value}"
            raise ConfigError(f"--{name.replace('_', '-')}{shown} with --pipeweaver: {why}")
    _check_sequence(args)
    if getattr(args, "num_experts", None):
        _check_experts(args, ours)
    if getattr(args, "multi_latent_attention", False):
        _check_latent(args)
    dropout = max(getattr(args, "attention_dropout", 0.0), getattr(args, "hidden_dropout", 0.0))
    if ours.deterministic and dropout:
        raise ConfigError(
            "--pipeweaver-deterministic with dropout: masks depend on the order of execution; "
            "add --attention-dropout 0 --hidden-dropout 0, or leave the flag out"
        )


def _check_experts(args: argparse.Namespace, ours: PipeWeaverArguments) -> None:
    """Refuse what experts cannot do under plans that change, or in chunks."""
    balancing = " ".join(_balancing(args))
    tensor, expert_tensor = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    shared = args.moe_shared_expert_intermediate_size
    refused = {
        f"--moe-router-load-balancing-type {balancing}": (
            "global_aux_loss" in balancing,
            "it averages over the microbatches that ran so far, in Megatron's own order; give "
            "aux_loss or seq_aux_loss",
        ),
        f"--context-parallel-size {args.context_parallel_size} and --moe-aux-loss-coeff": (
            args.context_parallel_size > 1 and _has_own_losses(args),
            "every rank's loss is that of the whole sequence, and its auxiliary loss would count "
            "for too little; give --moe-router-load-balancing-type none, or no context parallelism",
        ),
        f"--expert-tensor-parallel-size {expert_tensor}": (
            expert_tensor not in (None, tensor),
            f"experts are divided as all other layers are; give {tensor}",
        ),
        f"--moe-shared-expert-intermediate-size {shared}": (
            shared is not None and args.add_bias_linear,
            "Megatron's shared experts have no biases; add --disable-bias-linear",
        ),
        "--moe-grouped-gemm": (
            args.moe_grouped_gemm and args.transformer_impl == "local",
            "needs Transformer Engine; leave it out, or --transformer-impl local",
        ),
        "--moe-grouped-gemm and --use-cpu-initialization": (
            args.moe_grouped_gemm and args.use_cpu_initialization,
            "experts that are one tensor start from no value by name; leave one of them out",
        ),
        f"--moe-input-jitter-eps {args.moe_input_jitter_eps} and --pipeweaver-deterministic": (
            bool(args.moe_input_jitter_eps) and ours.deterministic,
            "noise depends on the order of execution; leave one of them out",
        ),
    }
    _refuse(refused)


def _check_latent(args: argparse.Namespace) -> None:
    """Refuse what latent attention cannot do in chunks."""
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    kind = args.position_embedding_type
    _refuse(
        {
            f"--position-embedding-type {kind} and --multi-latent-attention": (
                kind != "rope",
                "it turns its own channels by their positions; give rope",
            ),
            f"--tensor-model-parallel-size {tensor} and --multi-latent-attention": (
                tensor > 1 and not args.sequence_parallel,
                "Megatron would sum up gradients that every rank has in full; add "
                "--sequence-parallel",
            ),
            f"--context-parallel-size {context} and --multi-latent-attention": (
                context > 1 and args.transformer_impl == "local",
                "needs Transformer Engine; leave one of them out",
            ),
        }
    )


def _refuse(refused: Mapping[str, tuple[bool, str]]) -> None:
    """The first of the flags that is wrong, and what to do."""
    for flag, (wrong, why) in refused.items():
        if wrong:
            raise ConfigError(f"{flag} with --pipeweaver: {why}")


def _balancing(args: argparse.Namespace) -> Sequence[str]:
    """How routers balance their experts' loads."""
    kinds: str | list[str] = args.moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else kinds


def _has_own_losses(args: argparse.Namespace) -> bool:
    """Whether routers add losses of their own."""
    return args.moe_z_loss_coeff is not None or any("aux_loss" in one for one in _balancing(args))


def _check_sequence(args: argparse.Namespace) -> None:
    """Refuse a sequence that cannot be dealt to context- and sequence-parallel ranks."""
    context = getattr(args, "context_parallel_size", 1)
    if context == 1 or args.seq_length is None:
        return
    tensor = args.tensor_model_parallel_size if args.sequence_parallel else 1
    multiple = context * math.lcm(2, tensor)
    if args.seq_length % multiple:
        raise ConfigError(
            f"--seq-length {args.seq_length} with --context-parallel-size {context} and "
            f"--pipeweaver: cannot be dealt evenly; give a multiple of {multiple}"
        )
