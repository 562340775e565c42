"""PipeWeaver's flags in Megatron's parser, and what they may be combined with.

    parser ─► add_pipeweaver_arguments ─► Megatron parses ─► read_arguments ─► PipeWeaverArguments

A value on the command line wins over the same one in the file of ``--pipeweaver-config``, a JSON
object whose keys are the flags' names behind ``--pipeweaver-``, with underscores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.json_reader import JsonNode, parse_json, read_bytes
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.plugin.flag_values import (
    parse_counts,
    parse_fallback,
    parse_layers,
    parse_strategies,
    read_counts,
    read_fallback,
    read_layers,
    read_strategies,
    strategy_names,
)

PREFIX = "pipeweaver_"
"""In front of every attribute that the flags make, but for ``args.pipeweaver`` itself."""
_FILE = "config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """How long training waits for a searched plan, in milliseconds, before a static one runs.

    Then the planner has a process of its own. `None`: it plans in the training process, which
    waits for every search.
    """

    bound_ms: int | None


STATIC = Fallback(bound_ms=2000)
WAIT = Fallback(bound_ms=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeWeaverArguments:
    """What the flags ask for; every field is the flag of the same name.

    `sub_microbatch`, `segments` and `layers` hold the modules that are named, the others are chosen
    by the emulated times. `device_profile` is `None` for the device that is found, `strategies` for
    what pays on it; `dry_run` is `None` where training runs.
    """

    search_seconds: float = 1.0
    search_threads: int = 1
    sub_microbatch: Mapping[str, int] = field(default_factory=dict)
    segments: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    balance: bool = False
    device_profile: str | None = None
    strategies: tuple[LayerStrategy, ...] | None = None
    memory_fraction: float = 0.9
    host_memory_fraction: float = 0.4
    deterministic: bool = False
    fallback: Fallback = STATIC
    trace_dir: Path | None = None
    dry_run: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.search_seconds <= 1e6:
            raise ConfigError(
                f"--pipeweaver-search-seconds {self.search_seconds}: give seconds from 0 to 1000000"
            )
        if self.search_threads < 1:
            raise ConfigError(f"--pipeweaver-search-threads {self.search_threads}: give at least 1")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                f"--pipeweaver-memory-fraction {self.memory_fraction}: give a share of the "
                "device's memory above 0 and up to 1"
            )
        if not 0 <= self.host_memory_fraction <= 1:
            raise ConfigError(
                f"--pipeweaver-host-memory-fraction {self.host_memory_fraction}: give a share of "
                "the node's memory from 0 to 1"
            )
        if self.dry_run is not None and self.dry_run < 1:
            raise ConfigError(f"--pipeweaver-dry-run {self.dry_run}: give at least 1 batch")
        for module in self.layers.keys() & self.segments:
            raise ConfigError(
                f"{_flag('layers')} and {_flag('segments')} of {module}: its layers say how many "
                "segments it has; give one of them"
            )
        for flag in ("sub_microbatch", "segments"):
            for module, count in getattr(self, flag).items():
                if count < 1:
                    raise ConfigError(f"{_flag(flag)} {module}={count}: give at least 1")

    def search_config(self, seed: int, *, split_weight_grad: bool) -> SearchConfig:
        """The search's settings; whether it may split backwards depends on the layers."""
        return SearchConfig(
            time_budget_ns=round(self.search_seconds * SECOND_NS),
            threads=self.search_threads,
            seed=seed,
            deterministic=self.deterministic,
            split_weight_grad=split_weight_grad,
        )


def add_pipeweaver_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add PipeWeaver's group to Megatron's parser, and return it, as Megatron's own do."""
    group = parser.add_argument_group(title="pipeweaver")
    group.add_argument(
        "--pipeweaver",
        action="store_true",
        help="Cut every modality module into pipeline segments of its own, and run a schedule "
        "searched for each batch.",
    )
    group.add_argument(
        _flag(_FILE),
        metavar="FILE",
        help='JSON object of the flags below, as in {"search_seconds": 2, "segments": '
        '{"vision": 2}}; flags on the command line win.',
    )
    for name, one in _FLAGS.items():
        group.add_argument(_flag(name), **one.options)
    return parser


def read_arguments(args: argparse.Namespace) -> PipeWeaverArguments | None:
    """PipeWeaver's arguments, checked against each other; `None` without ``--pipeweaver``.

    Args:
        args: what Megatron's parser made.

    Raises:
        ConfigError: a value is wrong, or a flag stands there without ``--pipeweaver``.
    """
    names = (_FILE, *_FLAGS)
    given = {
        name: value for name in names if (value := getattr(args, PREFIX + name, None)) is not None
    }
    if not getattr(args, "pipeweaver", False):
        if given:
            raise ConfigError(
                f"{_flag(next(iter(given)))}: does nothing without --pipeweaver; add --pipeweaver"
            )
        return None
    path = given.pop(_FILE, None)
    values = {} if path is None else _read_file(Path(path))
    values |= given
    return PipeWeaverArguments(**{name: _FLAGS[name].make(one) for name, one in values.items()})


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


def settle_virtual_size(args: argparse.Namespace, virtual_size: int) -> None:
    """Have Megatron build `virtual_size` chunks per rank, the sum of all modules' segments."""
    args.virtual_pipeline_model_parallel_size = virtual_size if virtual_size > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flag:
    """How argparse takes a flag, how a file's value is read, and what is made of either.

    Megatron saves its arguments with every checkpoint, so they hold plain values alone.
    """

    options: Mapping[str, Any]
    read: Callable[[JsonNode], Any]
    make: Callable[[Any], Any] = lambda value: value


def _flag(name: str) -> str:
    return "--" + (PREFIX + name).replace("_", "-")


def _make_fallback(text: str) -> Fallback:
    if text == "wait":
        return WAIT
    _, _, bound = text.partition(":")
    return Fallback(bound_ms=int(bound)) if bound else STATIC


_FLAGS: Mapping[str, _Flag] = {
    "search_seconds": _Flag(
        options={
            "type": float,
            "metavar": "SECONDS",
            "help": "How long to search for the schedule of one batch. Default 1.",
        },
        read=JsonNode.number,
    ),
    "search_threads": _Flag(
        options={
            "type": int,
            "metavar": "N",
            "help": "Threads of the search, on the first rank of each replica. Default 1.",
        },
        read=JsonNode.integer,
    ),
    "sub_microbatch": _Flag(
        options={
            "type": parse_counts,
            "metavar": "MODULE=N[,...]",
            "help": "Most items of a module (images of vision) that one pass works on, as in "
            "vision=12. Chosen by emulated times where left out.",
        },
        read=read_counts,
    ),
    "segments": _Flag(
        options={
            "type": parse_counts,
            "metavar": "MODULE=K[,...]",
            "help": "Pipeline segments of a module, as in vision=2,language=1; their sum is the "
            "virtual pipeline size. Chosen by emulated times where left out.",
        },
        read=read_counts,
    ),
    "layers": _Flag(
        options={
            "type": parse_layers,
            "metavar": "MODULE=N:N:...[,...]",
            "help": "Layers of every stage of a module, as in vision=4:4:4:3,language=2:2:2:2; as "
            "many stages as pipeline ranks, or a multiple for several segments.",
        },
        read=read_layers,
    ),
    "balance": _Flag(
        options={
            "action": "store_true",
            "default": None,
            "help": "Search segments and layers per stage once, by the schedules of batches as "
            "they are expected, and log what was found as --pipeweaver-layers takes it.",
        },
        read=JsonNode.boolean,
    ),
    "device_profile": _Flag(
        options={
            "metavar": "NAME|FILE",
            "help": "Device to emulate: a shipped profile's name (H100, A100, cpu, ...) or a "
            "profile's file. Found by the device's name where left out.",
        },
        read=JsonNode.text,
    ),
    "strategies": _Flag(
        options={
            "type": parse_strategies,
            "metavar": "NAME[,...]",
            "help": "What plans may have a layer do with its activations, as in "
            "keep,recompute,recompute_mlp,offload. Chosen by the device where left out.",
        },
        read=read_strategies,
        make=strategy_names,
    ),
    "memory_fraction": _Flag(
        options={
            "type": float,
            "metavar": "SHARE",
            "help": "Share of the device's memory that weights, optimizer and activations may "
            "take. Default 0.9.",
        },
        read=JsonNode.number,
    ),
    "host_memory_fraction": _Flag(
        options={
            "type": float,
            "metavar": "SHARE",
            "help": "Share of the node's memory that offloaded activations of its ranks may take; "
            "pinned memory is given out in powers of two, so up to twice as much is taken. "
            "Default 0.4.",
        },
        read=JsonNode.number,
    ),
    "deterministic": _Flag(
        options={
            "action": "store_true",
            "default": None,
            "help": "Accumulate gradients in one order whatever the schedule is.",
        },
        read=JsonNode.boolean,
    ),
    "fallback": _Flag(
        options={
            "type": parse_fallback,
            "metavar": "static[:MILLISECONDS]|wait",
            "help": "Plan in a process of its own, and run the best static schedule where the "
            "searched one is not there within so many milliseconds (static, the default, waits "
            "2000), or have every iteration wait for its search (wait).",
        },
        read=read_fallback,
        make=_make_fallback,
    ),
    "trace_dir": _Flag(
        options={
            "metavar": "DIR",
            "help": "Write the problem, schedule, plan and measured trace of every iteration "
            "there.",
        },
        read=JsonNode.text,
        make=Path,
    ),
    "dry_run": _Flag(
        options={
            "type": int,
            "metavar": "N",
            "help": "Plan the first N batches from their metadata, print memory and time, and "
            "end; needs one process and no GPU.",
        },
        read=JsonNode.integer,
    ),
}
"""Every flag but the switch and the file, by the name of its field."""


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


def _read_file(path: Path) -> dict[str, Any]:
    root = parse_json(read_bytes(path), str(path))
    root.keys(frozenset(), optional=frozenset(_FLAGS))
    return {name: _FLAGS[name].read(node) for name, node in root.entries()}
