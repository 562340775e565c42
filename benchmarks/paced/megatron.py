"""The pipeline as Megatron's users would have it: one chain of layers, cut evenly, interleaved.

    vision ....................  language .......................
    | c0 | c1 | c2 | c3 | c4 | c5 | c6 | c7 |      chunk c on rank c mod P

The layers of all modules are joined and cut into ``P * V`` chunks of consecutive layers whose
largest is as small as can be, in parameters (as ``megatron`` is meant in the paper, section 7) or
in time on the average microbatch. A chunk runs a microbatch's items in one piece. The first `n`
layers of every chunk are recomputed (``--recompute-method block``); `n` is the least that fits
the memory in every batch, V the number of chunks per rank that is fastest over all batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from benchmarks.paced.interleaving import (
    ChunkCost,
    Costs,
    emulated_ns,
    interleaved_order,
    peak_bytes,
)
from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.batch import BatchMetadata, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.partition.workload import loads
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.memory import OptimizerOptions, stage_parameters
from megatron_pipeweaver.semu.model import AnalyticCostModel

_WHOLE = 1 << 40
"""Items per pass: all of a microbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`layers` consecutive layers of one module within a chunk."""

    module: ModuleSpec
    first_layer: int
    layers: int

    def shape(self, start: int = 0, stop: int | None = None) -> StageShape:
        """The layers `start:stop` of it as a stage; what stands around the layers goes with them.

        Embeddings go with the module's first layer, projector or head with its last.
        """
        end = self.layers if stop is None else stop
        first = self.first_layer + start
        return StageShape(
            layers=end - start,
            is_first=first == 0 and end > start,
            is_last=self.first_layer + end == self.module.layers and end > start,
            first_layer=first,
        )


Cut = tuple[tuple[Piece, ...], ...]
"""The pieces of every chunk along the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronSetting:
    """One way to run Megatron: chunks per rank, recomputed layers per chunk, their costs.

    `costs[batch]` are by stage and microbatch, `emulated_ns[batch]` the iteration without any
    overhead.
    """

    name: str
    chunks: int
    recomputed: int
    layers: tuple[int, ...]
    costs: tuple[Costs, ...]
    emulated_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A model on `pipeline_size` ranks of a device, and the batches that it is trained on."""

    model: ModelSpec
    pipeline_size: int
    costs: AnalyticCostModel
    optimizer: OptimizerOptions
    device_bytes: int
    batches: Sequence[BatchMetadata]

    def best(self, name: str, weights: Sequence[float], chunks: Sequence[int]) -> MegatronSetting:
        """The fastest setting that fits, with layers balanced by `weights` (one per layer).

        Raises:
            InfeasibleError: none fits, not even with everything recomputed.
        """
        found = [self._leanest_fit(name, weights, count) for count in chunks]
        fitting = [one for one in found if one is not None]
        if not fitting:
            raise InfeasibleError(f"{self.model.name}: Megatron's layout fits no setting")
        return min(fitting, key=lambda one: sum(one.emulated_ns))

    def parameter_weights(self) -> list[float]:
        """Parameters of every layer of the chain, with what stands around it."""
        return [
            float(stage_parameters(piece.module, piece.shape(), self.costs.options))
            for piece in self._single_layers()
        ]

    def time_weights(self) -> list[float]:
        """Mean time of every layer of the chain over all microbatches of all batches."""
        microbatches = [one for batch in self.batches for one in batch.microbatches]
        return [
            fmean(
                cost.forward_ns + cost.backward_ns
                for cost in (self._chunk_cost((piece,), one, 0) for one in microbatches)
            )
            for piece in self._single_layers()
        ]

    def _single_layers(self) -> list[Piece]:
        return [
            Piece(module=module, first_layer=layer, layers=1)
            for module in self.model.modules
            for layer in range(module.layers)
        ]

    def _leanest_fit(
        self, name: str, weights: Sequence[float], chunks: int
    ) -> MegatronSetting | None:
        sizes = balanced(weights, self.pipeline_size * chunks)
        cut = self._cut(sizes)
        capacity = self._capacity_bytes(cut)
        for recomputed in range(max(sizes) + 1):
            setting = self._setting(name, chunks, recomputed, sizes, cut, capacity)
            if setting is not None:
                return setting
        return None

    def _setting(
        self,
        name: str,
        chunks: int,
        recomputed: int,
        sizes: Sequence[int],
        cut: Cut,
        capacity: Sequence[int],
    ) -> MegatronSetting | None:
        """The setting, or `None` where a batch does not fit."""
        all_costs: list[Costs] = []
        times: list[int] = []
        for batch in self.batches:
            order = interleaved_order(self.pipeline_size, chunks, len(batch.microbatches))
            costs = [
                [self._chunk_cost(pieces, one, recomputed) for one in batch.microbatches]
                for pieces in cut
            ]
            peaks = peak_bytes(order, costs)
            if any(peak > most for peak, most in zip(peaks, capacity, strict=True)):
                return None
            all_costs.append(costs)
            times.append(emulated_ns(order, costs))
        return MegatronSetting(
            name=name,
            chunks=chunks,
            recomputed=recomputed,
            layers=tuple(sizes),
            costs=tuple(all_costs),
            emulated_ns=tuple(times),
        )

    def _cut(self, sizes: Sequence[int]) -> Cut:
        chain = self._single_layers()
        cut = []
        start = 0
        for size in sizes:
            pieces: list[Piece] = []
            for one in chain[start : start + size]:
                if pieces and pieces[-1].module is one.module:
                    last = pieces.pop()
                    one = Piece(
                        module=one.module, first_layer=last.first_layer, layers=last.layers + 1
                    )
                pieces.append(one)
            cut.append(tuple(pieces))
            start += size
        return tuple(cut)

    def _capacity_bytes(self, cut: Cut) -> tuple[int, ...]:
        """What each rank has for activations, besides weights, states and working memory."""
        options = self.costs.options
        per_parameter = options.element_bytes + options.gradient_bytes + self.optimizer.state_bytes
        shapes = {(piece.module, piece.shape()) for pieces in cut for piece in pieces}
        every = {
            (module, load)
            for batch in self.batches
            for microbatch in batch.microbatches
            for module, load in self._loads(microbatch).items()
        }
        working = max(
            self.costs.working_bytes(module, shape, load)
            for module, shape in shapes
            for name, load in every
            if name == module.name
        )
        capacity = []
        for rank in range(self.pipeline_size):
            parameters = sum(
                stage_parameters(piece.module, piece.shape(), options)
                for pieces in cut[rank :: self.pipeline_size]
                for piece in pieces
            )
            capacity.append(self.device_bytes - working - parameters * per_parameter)
        return tuple(capacity)

    def _chunk_cost(
        self, pieces: Sequence[Piece], microbatch: MicrobatchMetadata, recomputed: int
    ) -> ChunkCost:
        found = self._loads(microbatch)
        forward = backward = memory = latency = 0
        left = recomputed
        for piece in pieces:
            load = found.get(piece.module.name)
            again = min(left, piece.layers)
            left -= again
            if load is None:
                continue
            for shape, strategy in (
                (piece.shape(0, again), "recompute"),
                (piece.shape(again), "keep"),
            ):
                if not shape.layers:
                    continue
                cost = next(
                    one
                    for one in self.costs.stage_strategies(piece.module, shape, load)
                    if one.name == strategy
                )
                forward += cost.forward_ns
                backward += cost.backward_ns + cost.weight_grad_ns
                memory += cost.memory_bytes
            latency = self._latency_ns(piece.module, load)
        return ChunkCost(
            forward_ns=forward, backward_ns=backward, memory_bytes=memory, latency_ns=latency
        )

    def _latency_ns(self, module: ModuleSpec, load: Load) -> int:
        """As in PipeWeaver's problems: the hidden tensor of the module, over the same link."""
        options = self.costs.options
        shards = 1
        if module is self.model.backbone and options.parallel.sequence_parallel:
            shards = options.parallel.tensor
        rows = -(-load.sequence // shards) * load.batch
        return self.costs.p2p_latency_ns(rows * module.hidden_size * options.element_bytes)

    def _loads(self, microbatch: MicrobatchMetadata) -> dict[str, Load]:
        return dict(
            loads(
                BatchMetadata(microbatches=(microbatch,)),
                self.model,
                {one.name: _WHOLE for one in self.model.modules[:-1]},
            )
        )


def balanced(weights: Sequence[float], parts: int) -> tuple[int, ...]:
    """How many consecutive entries go to each part so that the heaviest is as light as can be.

    Raises:
        ValueError: there are fewer entries than parts.
    """
    count = len(weights)
    if count < parts:
        raise ValueError(f"{count} layers cannot fill {parts} chunks")
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)

    @cache
    def best(stop: int, left: int) -> tuple[float, int]:
        """(heaviest part, where the last part starts) of the first `stop` entries in `left`."""
        if left == 1:
            return sums[stop], 0
        return min(
            (max(best(start, left - 1)[0], sums[stop] - sums[start]), start)
            for start in range(left - 1, stop)
        )

    sizes = []
    stop = count
    for left in range(parts, 0, -1):
        start = best(stop, left)[1]
        sizes.append(stop - start)
        stop = start
    return tuple(reversed(sizes))
