"""PipeWeaver in Megatron's training loop: its flags, its chunks and its schedule, behind hooks.

    with megatron_training(VisionLanguage()):
        args = parse_and_validate_args(...)      # --pipeweaver and its group are known
        pretrain(config, datasets, ..., provider) # chunks, plans and schedule, if asked for

`megatron.training` ships with megatron-core since 0.19 and with every Megatron-LM checkout. It is
imported when the hooks are made, so that this module can be imported without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType

from megatron_pipeweaver.errors import ConfigError, UnsupportedMegatronError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.planner.background import BackgroundConfig, BackgroundSource
from megatron_pipeweaver.planner.settings import CostSettings, PlannerSettings
from megatron_pipeweaver.planner.source import InProcessSource, PlanSource
from megatron_pipeweaver.plugin.arguments import (
    WAIT,
    PipeWeaverArguments,
    add_pipeweaver_arguments,
    read_arguments,
    settle_virtual_size,
)
from megatron_pipeweaver.plugin.combinations import check_combinations
from megatron_pipeweaver.plugin.cpu_training import cpu_training_patches
from megatron_pipeweaver.plugin.cut import cut_model, memory_capacity
from megatron_pipeweaver.plugin.data import data_state_hook
from megatron_pipeweaver.plugin.delayed import splits_backwards
from megatron_pipeweaver.plugin.dry_run import plan_batches, play_first_rank
from megatron_pipeweaver.plugin.install import install, is_patched_fork, run_on_cpu, uninstall
from megatron_pipeweaver.plugin.journal import Journal, megatron_writer
from megatron_pipeweaver.plugin.node import host_share_bytes, search_threads
from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from megatron_pipeweaver.plugin.providers import ModelFamily
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from megatron_pipeweaver.plugin.torch_adam import torch_adam_patches
from megatron_pipeweaver.semu.devices import DeviceProfile, load_device, shipped_devices
from megatron_pipeweaver.semu.memory import OptimizerOptions
from megatron_pipeweaver.semu.options import Attention, RunOptions

_log = logging.getLogger(__name__)
_LOCAL_STRATEGIES = (
    LayerStrategy.KEEP,
    LayerStrategy.RECOMPUTE,
    LayerStrategy.ATTENTION,
    LayerStrategy.NORM,
    LayerStrategy.ACTIVATION,
    LayerStrategy.LIGHT,
    LayerStrategy.MLP,
    LayerStrategy.SHARED_EXPERTS,
    LayerStrategy.UP_PROJECTION,
)
"""What Megatron's own layers are planned with."""
_ENGINE_STRATEGIES = (
    LayerStrategy.KEEP,
    LayerStrategy.RECOMPUTE,
    LayerStrategy.ATTENTION,
    LayerStrategy.MLP,
    LayerStrategy.SHARED_EXPERTS,
    LayerStrategy.UP_PROJECTION,
)
"""And Transformer Engine's, whose norms are parts of the linears behind them."""
_CPU = "cpu"
"""The shipped profile of a machine without a GPU."""


@contextlib.contextmanager
def megatron_training(family: ModelFamily) -> Iterator[None]:
    """Megatron's training with PipeWeaver's hooks in place, on a GPU or on CPU.

    Args:
        family: what the script's model is.

    Raises:
        UnsupportedMegatronError: there is no `megatron.training`.
    """
    with run_on_cpu(), PatchSet(training_patches(family)):
        yield


def training_patches(family: ModelFamily) -> list[Patch]:
    """The hooks, not applied yet.

    Args:
        family: what the script's model is.

    Raises:
        UnsupportedMegatronError: there is no `megatron.training`.
    """
    if find_spec("megatron.training") is None:
        raise UnsupportedMegatronError(
            "megatron.training cannot be imported: this megatron-core ships without it; "
            "install megatron-core 0.19, or put a Megatron-LM checkout on PYTHONPATH"
        )
    import megatron.training
    from megatron.core.datasets import utils as dataset_utils
    from megatron.training import arguments, checkpointing, initialize, training

    pretrain = pretrain_hook(training.pretrain, family)
    validate = validation_hook(arguments.validate_args)
    # core_v0.16 validates where it initializes, by a name of its own.
    validating = [one for one in (arguments, initialize) if hasattr(one, "validate_args")]
    hooks = [
        Patch(arguments, "add_megatron_arguments", parser_hook(arguments.add_megatron_arguments)),
        *(Patch(module, "validate_args", validate) for module in validating),
        Patch(training, "pretrain", pretrain),
        Patch(megatron.training, "pretrain", pretrain),
    ]
    return [
        *([] if is_patched_fork() else hooks),
        Patch(
            checkpointing,
            "maybe_save_dataloader_state",
            data_state_hook(checkpointing.maybe_save_dataloader_state),
        ),
        Patch(dataset_utils, "compile_helpers", built_helpers_hook(dataset_utils.compile_helpers)),
        *torch_adam_patches(),
        *cpu_training_patches(training),
    ]


def parser_hook(original: Callable[..., argparse.ArgumentParser]) -> Callable[..., Any]:
    """Megatron's `add_megatron_arguments` with PipeWeaver's group."""

    @functools.wraps(original)
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_pipeweaver_arguments(original(parser))

    return add


def validation_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `validate_args`, behind PipeWeaver's own refusals."""

    @functools.wraps(original)
    def validate(args: argparse.Namespace, *more: Any, **named: Any) -> Any:
        ours = read_arguments(args)
        if ours is not None:
            check_combinations(args, ours)
            if ours.dry_run is not None:
                play_first_rank(args)
        if not torch.cuda.is_available():
            args.distributed_backend = "gloo"
        validated = original(args, *more, **named)
        if args.num_experts is not None and args.decoder_num_layers is not None:
            # Megatron logs every layer's auxiliary loss, and takes the encoder's layers for all.
            args.num_layers = args.decoder_num_layers
        if ours is not None:
            # All gathers start in front of the schedule (`gathers`); the hooks only await them.
            args.align_param_gather = args.overlap_param_gather
        return validated

    return validate


def pretrain_hook(original: Callable[..., Any], family: ModelFamily) -> Callable[..., Any]:
    """Megatron's `pretrain` with PipeWeaver's chunks and schedule where ``--pipeweaver`` stands."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def pretrain(*positional: Any, **named: Any) -> Any:
        call = signature.bind(*positional, **named)
        with initialized(call.arguments) if parses_itself(original) else contextlib.nullcontext():
            return pretrain_in_chunks(original, call, family)

    return pretrain


def pretrain_in_chunks(
    original: Callable[..., Any], call: inspect.BoundArguments, family: ModelFamily
) -> Any:
    """Megatron's `pretrain`, its arguments known, with what PipeWeaver puts in its places."""
    from megatron.training import get_args, print_rank_0, training

    args = get_args()
    ours = read_arguments(args)
    if ours is None:
        return original(*call.args, **call.kwargs)
    settings = planner_settings(args, ours, family)
    settle(args, settings.layout.virtual_size)
    given = call.arguments
    provider = given["train_valid_test_dataset_provider"]
    if ours.dry_run is not None:
        if not parallel_state.is_initialized():
            training.initialize_megatron()
        print_rank_0(plan_batches(ours.dry_run, args, settings, family.describe(args), provider))
        return None
    given["model_provider"] = family.provider(args, settings.layout, given.get("model_provider"))
    given["train_valid_test_dataset_provider"] = staged_provider(provider)
    with scheduled(args, ours, settings, family):
        return original(*call.args, **call.kwargs)


def settle(args: argparse.Namespace, virtual_size: int) -> None:
    """As many chunks per rank in the arguments, and in Megatron's state where it is made."""
    settle_virtual_size(args, virtual_size)
    if virtual_size > 1 and parallel_state.is_initialized():
        parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual_size)
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)


def parses_itself(pretrain: Callable[..., Any]) -> bool:
    """Whether `pretrain` reads the command line, as in core_v0.16; later the script does."""
    return "extra_args_provider" in inspect.signature(pretrain).parameters


@contextlib.contextmanager
def initialized(given: Mapping[str, Any]) -> Iterator[None]:
    """Megatron initialized as its `pretrain`, called with `given`, would do it first thing.

    So that its arguments are known when `pretrain` begins, which then leaves that out.
    """
    from megatron.training import training

    names = inspect.signature(training.initialize_megatron).parameters
    training.initialize_megatron(**{name: one for name, one in given.items() if name in names})
    with PatchSet([Patch(training, "initialize_megatron", lambda **_: None)]):
        yield


def run_pretrain(
    data_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    model_provider: Callable[..., Any],
    *,
    extra_args_provider: Callable[..., Any],
    args_defaults: Mapping[str, Any],
) -> None:
    """Call Megatron's `pretrain` in the manner of its version.

    Args:
        data_provider: makes the data sets, or iterators.
        forward_step: one microbatch through the model.
        model_provider: makes the model.
        extra_args_provider: adds the script's own flags to Megatron's parser.
        args_defaults: what flags are where the command line does not say.
    """
    from megatron.training import pretrain

    kind = ModelType.encoder_or_decoder
    own = {"extra_args_provider": extra_args_provider, "args_defaults": dict(args_defaults)}
    if parses_itself(pretrain):
        pretrain(data_provider, model_provider, kind, forward_step, **own)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    config = pretrain_cfg_container_from_args(parse_and_validate_args(**own))
    pretrain(config, data_provider, kind, forward_step, model_provider)


def staged_provider(original: Callable[..., Any]) -> Callable[..., Any]:
    """A data set provider that takes the `vp_stage` which Megatron hands to virtual pipelines."""
    takes_stage = "vp_stage" in inspect.signature(original).parameters

    def provide(num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
        return original(num_samples, vp_stage=vp_stage) if takes_stage else original(num_samples)

    provide.is_distributed = getattr(original, "is_distributed", False)  # type: ignore[attr-defined]
    return provide


@contextlib.contextmanager
def scheduled(
    args: argparse.Namespace,
    ours: PipeWeaverArguments,
    settings: PlannerSettings,
    family: ModelFamily,
) -> Iterator[PlanSource]:
    """PipeWeaver's schedule in Megatron's place; yields where its plans come from."""
    source = plan_source(ours, settings)
    journal = Journal(ours.trace_dir, megatron_writer(), lambda: int(args.curr_iteration) + 1)
    schedule = PipeWeaverSchedule(
        source,
        family.describe(args),
        gather_traces=ours.trace_dir is not None or ours.fallback != WAIT,
        on_iteration=journal.record,
        wait_timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )
    install(schedule)
    try:
        yield source
        _log.info("planner: %s", source.counters)
    finally:
        uninstall()
        source.close()
        journal.close()


def plan_source(ours: PipeWeaverArguments, settings: PlannerSettings) -> PlanSource:
    """The planner beside training, or in its process, as ``--pipeweaver-fallback`` says."""
    bound_ms = ours.fallback.bound_ms
    if bound_ms is None:
        return InProcessSource(settings.make())
    return BackgroundSource(
        settings.with_threads(search_threads(settings.costs.options.parallel)),
        BackgroundConfig(wait_ns=bound_ms * 1_000_000, details=ours.trace_dir is not None),
    )


# --- what the planner is told --------------------------------------------------------------------


def planner_settings(
    args: argparse.Namespace, ours: PipeWeaverArguments, family: ModelFamily
) -> PlannerSettings:
    """Everything that plans follow from: the model, its cut, the device, memory and search.

    Raises:
        ConfigError: arguments and model do not fit each other.
        InfeasibleError: weights and optimizer state alone fill the device.
    """
    spec = family.spec(args)
    device = load_device(ours.device_profile or found_device())
    local = args.transformer_impl == "local"
    costs = CostSettings(
        device=device,
        options=run_options(args),
        strategies=planned_strategies(
            ours,
            device,
            local=local,
            latent=any(one.layer.latent is not None for one in spec.modules),
        ),
    )
    # Adam's two moments, and a master weight where the weights themselves are not in fp32.
    optimizer = OptimizerOptions(
        state_bytes=8 if args.params_dtype is torch.float32 else 12,
        distributed=args.use_distributed_optimizer,
    )
    partition = cut_model(args, ours, family, costs, optimizer)
    dtype = str(args.params_dtype).removeprefix("torch.")
    return PlannerSettings(
        model=spec,
        layout=partition.layout,
        costs=costs,
        sub_microbatch=partition.sub_microbatch,
        memory_capacity_bytes=memory_capacity(ours, spec, partition.layout, costs, optimizer),
        dtypes={one.name: dtype for one in spec.modules},
        search=ours.search_config(args.seed, split_weight_grad=splits_backwards(args)),
        host_memory_bytes=host_memory(ours),
    )


def planned_strategies(
    ours: PipeWeaverArguments, device: DeviceProfile, *, local: bool, latent: bool = False
) -> tuple[LayerStrategy, ...]:
    """What plans may have layers do with their activations: as asked for, or as the device does it.

    Copies to the host pay on a GPU, which makes them beside its work, and not on a CPU, where host
    and device are one memory. A dry run plans for the device that is emulated.

    Args:
        ours: the flags.
        device: what is emulated.
        local: the layers are Megatron's own, not Transformer Engine's.
        latent: some have latent attention; up projections of others are not worth a thought.

    Raises:
        ConfigError: these layers cannot do what is asked for.
    """
    possible = (*(_LOCAL_STRATEGIES if local else _ENGINE_STRATEGIES), LayerStrategy.OFFLOAD)
    if ours.strategies is None:
        possible = tuple(
            one for one in possible if latent or one is not LayerStrategy.UP_PROJECTION
        )
        emulated = ours.dry_run is not None and device.spec.name != _CPU
        return possible if emulated or torch.cuda.is_available() else possible[:-1]
    for one in ours.strategies:
        if one not in possible:
            raise ConfigError(
                f"--pipeweaver-strategies {one.value}: Transformer Engine's layers cannot; "
                f"give some of {', '.join(each.value for each in possible)}"
            )
    return ours.strategies


def run_options(args: argparse.Namespace) -> RunOptions:
    """How Megatron's arguments have the layers run, as far as costs depend on it."""
    engine = args.transformer_impl == "transformer_engine"
    element_bytes = torch.finfo(args.params_dtype).bits // 8
    reduced_in_fp32 = args.accumulate_allreduce_grads_in_fp32
    return RunOptions(
        parallel=ParallelSizes(
            pipeline=args.pipeline_model_parallel_size,
            tensor=args.tensor_model_parallel_size,
            data=args.data_parallel_size,
            context=args.context_parallel_size,
            expert=args.expert_model_parallel_size,
            sequence_parallel=args.sequence_parallel,
        ),
        attention=Attention.FLASH if engine else Attention.DENSE,
        element_bytes=element_bytes,
        gradient_bytes=4 if reduced_in_fp32 else element_bytes,
        fused_norm=engine,
        fused_activation=engine,
        fused_rotary=engine and getattr(args, "apply_rope_fusion", True),
        fused_linear=engine,
        dropout=args.hidden_dropout > 0 or args.attention_dropout > 0,
        mask_bytes=1 if torch.cuda.is_available() else element_bytes,
    )


def host_memory(ours: PipeWeaverArguments) -> int | None:
    """What offloaded activations may take of this rank's host; a dry run's is another machine's."""
    return None if ours.dry_run is not None else host_share_bytes(ours.host_memory_fraction)


def found_device() -> str:
    """The name of the shipped profile of this machine's device.

    Raises:
        ConfigError: there is a GPU and no profile of it.
    """
    if not torch.cuda.is_available():
        return _CPU
    name = torch.cuda.get_device_name()
    words = name.upper().replace("-", " ").split()
    for profile in shipped_devices():
        if profile.upper() in words:
            return profile
    raise ConfigError(
        f"device {name!r}: there is no profile of it; name one with --pipeweaver-device-profile, "
        f"of {list(shipped_devices())} or a file of your own"
    )


# --- what Megatron's training needs elsewhere ----------------------------------------------------


def built_helpers_hook(original: Callable[[], None]) -> Callable[[], None]:
    """Megatron's `compile_helpers` where there is something to compile.

    The wheel ships the built library and no Makefile, for want of which the original ends the
    process.
    """

    @functools.wraps(original)
    def compile_helpers() -> None:
        if find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers
