"""Batch metadata and costs in, scheduling problem out (paper, section 3, online part)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.plan import PassPayload, PlanPass
from megatron_pipeweaver.ir.problem import Microbatch, Pass, PassKey, Problem, Strategy
from megatron_pipeweaver.partition.sub_microbatch import split
from megatron_pipeweaver.semu.interface import CostModel, Load, StageShape
from megatron_pipeweaver.semu.stages import canonical_stage, module_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One iteration's problem, and what every pass of it works on."""

    problem: Problem
    payloads: Mapping[PassKey, PassPayload]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """What one or many passes work on: their load, their output's shape.

    Equal work of one batch is one object.
    """

    load: Load
    output_shape: tuple[int, ...]


class _Share(NamedTuple):
    """One pass before its costs: its item range, and what it works on."""

    start: int
    stop: int
    work: _Work


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
        parallel: tensor, sequence and context parallel sizes; the backbone's hidden tensors hold a
            context-parallel share of the sequence and, where sequence parallelism is on, a
            tensor-parallel share of that.
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
        payloads=_Payloads(model, parallel),
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


class _Payloads:
    """What passes work on, and the shapes that they hand on."""

    __slots__ = ("_backbone", "_shards")

    def __init__(self, model: ModelSpec, parallel: ParallelSizes | None) -> None:
        # As in Megatron's LLaVA, sequence and context parallelism are the backbone's alone.
        self._backbone = model.backbone
        self._shards = 1
        if parallel is not None:
            self._shards = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)

    def make(self, module: ModuleSpec, start: int, stop: int, work: _Work) -> PassPayload:
        hidden_shape = self._hidden_shape(module, work.load)
        return PassPayload(
            item_start=start,
            item_stop=stop,
            hidden_shape=hidden_shape,
            output_shape=work.output_shape or hidden_shape,
        )

    def _hidden_shape(self, module: ModuleSpec, load: Load) -> tuple[int, ...]:
        shards = self._shards if module is self._backbone else 1
        if not module.time_tokens:
            return (-(-load.sequence // shards), load.batch, module.hidden_size)
        # Times and prompts travel in front of the clips' patches, all in one row.
        times = module.time_tokens * len(load.lengths)
        rows = times + sum(load.context_lengths) + load.tokens
        return (-(-rows // shards), 1, module.hidden_size)


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
    """Passes of one microbatch after another; equal ones, and equal stages, are made once."""

    __slots__ = (
        "_costs",
        "_element_bytes",
        "_forward_only",
        "_made",
        "_model",
        "_payloads",
        "_shapes",
        "_sharing",
        "_stages_of",
    )

    def __init__(
        self,
        *,
        model: ModelSpec,
        layout: ChunkLayout,
        sub_microbatch: Mapping[str, int],
        costs: CostModel,
        forward_only: bool,
        payloads: _Payloads,
        element_bytes: int,
    ) -> None:
        self._model = model
        self._sharing = _Sharing(model, sub_microbatch)
        self._shapes = {
            cut.module: tuple(
                canonical_stage(model.module(cut.module), stage) for stage in module_stages(cut)
            )
            for cut in layout.modules
        }
        self._costs = costs
        self._forward_only = forward_only
        self._payloads = payloads
        self._element_bytes = element_bytes
        self._made: dict[tuple[_Work, int, tuple[tuple[str, int], ...], bool], Pass] = {}
        self._stages_of: dict[tuple[_Work, bool], tuple[tuple[Strategy, ...], ...]] = {}

    def passes(self, metadata: MicrobatchMetadata) -> Iterator[tuple[Pass, PassPayload]]:
        """Every pass of one microbatch with its payload, modules in forward order."""
        shares: dict[str, tuple[_Share, ...]] = {}
        frozen: dict[str, bool] = {}
        for module in self._model.modules:
            present = [name for name in module.after if shares[name]]
            shares[module.name] = self._sharing.shares(module, metadata)
            frozen[module.name] = self._forward_only or (
                module.frozen and all(frozen[name] for name in present)
            )
            after = tuple((name, sub) for name in present for sub in range(len(shares[name])))
            for sub, (start, stop, work) in enumerate(shares[module.name]):
                payload = self._payloads.make(module, start, stop, work)
                key = (work, sub, after, frozen[module.name])
                made = self._made.get(key)
                if made is None:
                    made = self._made[key] = Pass(
                        module=module.name,
                        sub_microbatch=sub,
                        after=after,
                        p2p_latency_ns=self._costs.p2p_latency_ns(
                            prod(payload.hidden_shape) * self._element_bytes
                        ),
                        stages=self._stages(module, work, frozen=frozen[module.name]),
                        frozen=frozen[module.name],
                    )
                yield made, payload

    def _stages(
        self, module: ModuleSpec, work: _Work, *, frozen: bool
    ) -> tuple[tuple[Strategy, ...], ...]:
        found = self._stages_of.get((work, frozen))
        if found is None:
            shapes = self._shapes[module.name]
            alike = {shape: self._strategies(module, shape, work, frozen) for shape in set(shapes)}
            found = tuple(alike[shape] for shape in shapes)
            self._stages_of[work, frozen] = found
        return found

    def _strategies(
        self, module: ModuleSpec, shape: StageShape, work: _Work, frozen: bool
    ) -> tuple[Strategy, ...]:
        strategies = self._costs.stage_strategies(module, shape, work.load)
        return (_forward_alone(strategies),) if frozen else strategies


def payloads_of(
    batch: BatchMetadata,
    model: ModelSpec,
    passes: Iterable[PlanPass],
    parallel: ParallelSizes | None = None,
) -> dict[PassKey, PassPayload]:
    """What `passes`, planned for a batch of at least as much, work on in `batch`.

    A pass of items that `batch` has not is left out.

    Args:
        batch: with as many microbatches.
        model: the modules.
        passes: of a plan.
        parallel: as in `make_workload`.
    """
    sharing, maker = _Sharing(model, {}), _Payloads(model, parallel)
    payloads = {}
    for one in passes:
        module = model.module(one.key.module)
        metadata = batch.microbatches[one.key.microbatch]
        share = sharing.within(module, metadata, one.payload.item_start, one.payload.item_stop)
        if share is not None:
            payloads[one.key] = maker.make(module, *share)
    return payloads


def loads(
    batch: BatchMetadata, model: ModelSpec, sub_microbatch: Mapping[str, int]
) -> Iterator[tuple[str, Load]]:
    """Module and load of every pass of `batch`, microbatch by microbatch."""
    sharing = _Sharing(model, sub_microbatch)
    for metadata in batch.microbatches:
        for module in model.modules:
            for share in sharing.shares(module, metadata):
                yield module.name, share.work.load


class _Sharing:
    """The passes' shares of one microbatch after another; equal work is made once."""

    __slots__ = ("_backbone", "_found", "_sub_microbatch")

    def __init__(self, model: ModelSpec, sub_microbatch: Mapping[str, int]) -> None:
        self._backbone = model.backbone
        self._sub_microbatch = sub_microbatch
        self._found: dict[Hashable, _Work] = {}

    def shares(self, module: ModuleSpec, metadata: MicrobatchMetadata) -> tuple[_Share, ...]:
        """One share per pass of `module` over `metadata`."""
        if module is self._backbone:
            return (_Share(0, metadata.samples, self._whole(module, metadata)),)
        items = metadata.items.get(module.name, ())
        return tuple(
            _Share(start, stop, self._part(module, items[start:stop]))
            for start, stop in split(len(items), self._sub_microbatch[module.name])
        )

    def within(
        self, module: ModuleSpec, metadata: MicrobatchMetadata, start: int, stop: int
    ) -> _Share | None:
        """The share of what there is of the items ``start:stop``; the backbone's is everything."""
        if module is self._backbone:
            return self.shares(module, metadata)[0]
        items = metadata.items.get(module.name, ())[start:stop]
        return _Share(start, start + len(items), self._part(module, items)) if items else None

    def _whole(self, module: ModuleSpec, metadata: MicrobatchMetadata) -> _Work:
        # Tokens that are placed in the sequence itself are no context.
        context: tuple[int, ...] = ()
        if module.layer.context_size is not None:
            context = tuple(
                item.tokens
                for name in module.after
                for item in metadata.items.get(name, ())
                if item.tokens
            )
        sizes = (metadata.sequence_length, metadata.samples, metadata.document_lengths, context)
        key = (module.name, *sizes)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _whole(*sizes)
        return found

    def _part(self, module: ModuleSpec, items: tuple[Item, ...]) -> _Work:
        alike = items.count(items[0]) == len(items)
        key = (module.name, len(items), items[:1] if alike else items)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = _part(module, items, alike=alike)
        return found


def _whole(
    sequence: int, samples: int, documents: tuple[int, ...], context: tuple[int, ...]
) -> _Work:
    """The backbone's pass: all samples; packed documents, and their padding, apart."""
    lengths = (sequence,) * samples
    if documents:
        padding = sequence * samples - sum(documents)
        lengths = documents + ((padding,) if padding else ())
    load = Load(
        sequence=sequence,
        batch=samples,
        lengths=lengths,
        output_tokens=sequence * samples,
        context_lengths=context,
    )
    return _Work(load=load, output_shape=())


def _part(module: ModuleSpec, items: tuple[Item, ...], *, alike: bool) -> _Work:
    """A pass over some items: side by side when they are alike, else packed into one row."""
    rows = items[:1] if alike else items
    batch = len(items) if alike else 1
    tokens = sum(item.tokens for item in rows)
    load = Load(
        sequence=sum(item.units for item in rows),
        batch=batch,
        lengths=tuple(item.units for item in items),
        output_tokens=tokens * batch,
    )
    return _Work(load=load, output_shape=(tokens, batch, module.output_size or module.hidden_size))


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
