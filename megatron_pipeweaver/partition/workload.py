"""Batch metadata and costs in, scheduling problem out (paper, section 3, online part)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.plan import PassPayload
from megatron_pipeweaver.ir.problem import Microbatch, Pass, PassKey, Problem, Strategy
from megatron_pipeweaver.partition.sub_microbatch import split
from megatron_pipeweaver.semu.interface import CostModel, Load, StageShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One iteration's problem, and what every pass of it works on."""

    problem: Problem
    payloads: Mapping[PassKey, PassPayload]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One pass before its costs: its item range, its load, its output's shape."""

    start: int
    stop: int
    load: Load
    output_shape: tuple[int, ...]


def make_workload(
    batch: BatchMetadata,
    model: ModelSpec,
    layout: ChunkLayout,
    sub_microbatch: Mapping[str, int],
    costs: CostModel,
    memory_capacity_bytes: Sequence[int],
    forward_only: bool = False,
    parallel: ParallelSizes | None = None,
    element_bytes: int = 2,
) -> Workload:
    """The scheduling problem of `batch`.

    The backbone runs one pass per microbatch over its whole sequence; every other module one pass
    per sub-microbatch of its items, none where it has none. A pass waits for exactly those passes
    of its microbatch that are there. A frozen module has no backward, unless a module that it
    consumes is trained in this microbatch: then it hands gradients on and has no weight gradient.

    Args:
        batch: what the next iteration holds.
        model: the modules; every module that has items must be in it.
        layout: the modules' cuts.
        sub_microbatch: B_i, the largest sub-microbatch in items, for every module but the backbone.
        costs: times and memory of stage pairs.
        memory_capacity_bytes: bytes for activations, by pipeline rank.
        forward_only: evaluation; every pass is frozen.
        parallel: tensor and sequence parallel sizes; where sequence parallelism is on, the
            backbone's hidden tensors hold a tensor-parallel share of the sequence.
        element_bytes: bytes of one element of the tensors that cross rank borders.

    Returns:
        The problem, and one payload per pass; shapes are ``(sequence, batch, width)``.

    Raises:
        ConfigError: a size is missing, or the batch has items of a module the model has not.
    """
    _check_names(batch, model, layout, sub_microbatch)
    maker = _PassMaker(
        model=model,
        layout=layout,
        sub_microbatch=sub_microbatch,
        costs=costs,
        forward_only=forward_only,
        sequence_shards=(
            parallel.tensor if parallel is not None and parallel.sequence_parallel else 1
        ),
        element_bytes=element_bytes,
    )
    payloads: dict[PassKey, PassPayload] = {}
    microbatches = []
    for index, metadata in enumerate(batch.microbatches):
        passes = []
        for one, payload in maker.passes(metadata):
            passes.append(one)
            payloads[PassKey(index, one.module, one.sub_microbatch)] = payload
        microbatches.append(Microbatch(passes=tuple(passes)))
    problem = Problem(
        pipeline_size=layout.pipeline_size,
        memory_capacity_bytes=tuple(memory_capacity_bytes),
        modules={one.module: one.segments for one in layout.modules},
        microbatches=tuple(microbatches),
    )
    return Workload(problem=problem, payloads=payloads)


def _check_names(
    batch: BatchMetadata, model: ModelSpec, layout: ChunkLayout, sub_microbatch: Mapping[str, int]
) -> None:
    names = [module.name for module in model.modules]
    if [one.module for one in layout.modules] != names:
        raise ConfigError(
            f"workload: the layout's modules {[one.module for one in layout.modules]} are not "
            f"those of model {model.name!r}, {names}"
        )
    encoders = names[:-1]
    missing = sorted(set(encoders) - set(sub_microbatch))
    if missing:
        raise ConfigError(f"workload: no sub-microbatch size for {missing}; give one per encoder")
    for index, metadata in enumerate(batch.microbatches):
        unknown = sorted(name for name in metadata.items if name not in encoders)
        if unknown:
            raise ConfigError(
                f"workload: microbatch {index} has items of {unknown}; "
                f"model {model.name!r} takes items of {encoders}"
            )


class _PassMaker:
    """Passes of one microbatch after another; equal ones are made once."""

    __slots__ = (
        "_costs",
        "_element_bytes",
        "_forward_only",
        "_layout",
        "_made",
        "_model",
        "_sequence_shards",
        "_sub_microbatch",
    )

    def __init__(
        self,
        *,
        model: ModelSpec,
        layout: ChunkLayout,
        sub_microbatch: Mapping[str, int],
        costs: CostModel,
        forward_only: bool,
        sequence_shards: int,
        element_bytes: int,
    ) -> None:
        self._model = model
        self._layout = layout
        self._sub_microbatch = sub_microbatch
        self._costs = costs
        self._forward_only = forward_only
        self._sequence_shards = sequence_shards
        self._element_bytes = element_bytes
        self._made: dict[Hashable, Pass] = {}

    def passes(self, metadata: MicrobatchMetadata) -> Iterator[tuple[Pass, PassPayload]]:
        """Every pass of one microbatch with its payload, modules in forward order."""
        shares: dict[str, tuple[_Share, ...]] = {}
        frozen: dict[str, bool] = {}
        for module, cut in zip(self._model.modules, self._layout.modules, strict=True):
            present = [name for name in module.after if shares[name]]
            shares[module.name] = _shares(self._model, module, metadata, self._sub_microbatch)
            frozen[module.name] = self._forward_only or (
                module.frozen and all(frozen[name] for name in present)
            )
            after = tuple((name, sub) for name in present for sub in range(len(shares[name])))
            for sub, share in enumerate(shares[module.name]):
                hidden_shape = self._hidden_shape(module, share.load)
                key = (module.name, sub, after, frozen[module.name], share.load)
                if key not in self._made:
                    self._made[key] = Pass(
                        module=module.name,
                        sub_microbatch=sub,
                        after=after,
                        p2p_latency_ns=self._costs.p2p_latency_ns(
                            prod(hidden_shape) * self._element_bytes
                        ),
                        stages=self._stages(module, cut, share.load, frozen[module.name]),
                        frozen=frozen[module.name],
                    )
                yield (
                    self._made[key],
                    PassPayload(
                        item_start=share.start,
                        item_stop=share.stop,
                        hidden_shape=hidden_shape,
                        output_shape=share.output_shape or hidden_shape,
                    ),
                )

    def _hidden_shape(self, module: ModuleSpec, load: Load) -> tuple[int, ...]:
        # As in Megatron's LLaVA, sequence parallelism is the backbone's alone.
        shards = self._sequence_shards if module is self._model.backbone else 1
        return (-(-load.sequence // shards), load.batch, module.hidden_size)

    def _stages(
        self, module: ModuleSpec, cut: ModuleLayout, load: Load, frozen: bool
    ) -> tuple[tuple[Strategy, ...], ...]:
        first_layer = 0
        stages = []
        for stage, layers in enumerate(cut.layers):
            strategies = self._costs.stage_strategies(
                module,
                StageShape(
                    layers=layers,
                    is_first=stage == 0,
                    is_last=stage == len(cut.layers) - 1,
                    first_layer=first_layer,
                ),
                load,
            )
            stages.append((_forward_alone(strategies),) if frozen else strategies)
            first_layer += layers
        return tuple(stages)


def loads(
    batch: BatchMetadata, model: ModelSpec, sub_microbatch: Mapping[str, int]
) -> Iterator[tuple[str, Load]]:
    """Module and load of every pass of `batch`, microbatch by microbatch."""
    for metadata in batch.microbatches:
        for module in model.modules:
            for share in _shares(model, module, metadata, sub_microbatch):
                yield module.name, share.load


def _shares(
    model: ModelSpec,
    module: ModuleSpec,
    metadata: MicrobatchMetadata,
    sub_microbatch: Mapping[str, int],
) -> tuple[_Share, ...]:
    if module is model.backbone:
        return (_whole(module, metadata),)
    items = metadata.items.get(module.name, ())
    return tuple(
        _part(module, start, items[start:stop])
        for start, stop in split(len(items), sub_microbatch[module.name])
    )


def _whole(module: ModuleSpec, metadata: MicrobatchMetadata) -> _Share:
    """The backbone's pass: all samples; packed documents, and their padding, apart."""
    lengths: tuple[int, ...] = (metadata.sequence_length,) * metadata.samples
    if metadata.document_lengths:
        padding = metadata.sequence_length * metadata.samples - sum(metadata.document_lengths)
        lengths = metadata.document_lengths + ((padding,) if padding else ())
    # Tokens that are placed in the sequence itself are no context.
    context = tuple(
        item.tokens
        for name in module.after
        for item in metadata.items.get(name, ())
        if item.tokens and module.layer.context_size is not None
    )
    load = Load(
        sequence=metadata.sequence_length,
        batch=metadata.samples,
        lengths=lengths,
        output_tokens=metadata.sequence_length * metadata.samples,
        context_lengths=context,
    )
    return _Share(start=0, stop=metadata.samples, load=load, output_shape=())


def _part(module: ModuleSpec, start: int, items: tuple[Item, ...]) -> _Share:
    """A pass over some items: side by side when they are alike, else packed into one row."""
    alike = len({(item.units, item.tokens) for item in items}) == 1
    rows = items[:1] if alike else items
    batch = len(items) if alike else 1
    tokens = sum(item.tokens for item in rows)
    load = Load(
        sequence=sum(item.units for item in rows),
        batch=batch,
        lengths=tuple(item.units for item in items),
        output_tokens=tokens * batch,
    )
    return _Share(
        start=start,
        stop=start + len(items),
        load=load,
        output_shape=(tokens, batch, module.output_size or module.hidden_size),
    )


def _forward_alone(strategies: Sequence[Strategy]) -> Strategy:
    """The quickest forward, without a backward; its memory is released when it ends."""
    best = min(strategies, key=lambda one: (one.forward_ns, one.memory_bytes))
    return Strategy(
        name=best.name,
        forward_ns=best.forward_ns,
        backward_ns=0,
        weight_grad_ns=0,
        memory_bytes=min(one.memory_bytes for one in strategies),
    )
