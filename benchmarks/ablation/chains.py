"""Static systems that cut the whole model, encoder and backbone together, into contiguous chunks.

vision layers ................ | language layers ..............
chunk 0 | chunk 1 | chunk 2 | ch. 3 | chunk 4 | chunk 5 | ...      chunk c on rank c mod P

Re-implemented from public descriptions; each makes a `Problem` with one module of V segments, so
that its schedules are checked like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from benchmarks.ablation.jobs import Bench, whole_run_strategy
from megatron_pipeweaver.ir.batch import BatchMetadata, MicrobatchMetadata
from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from megatron_pipeweaver.partition.workload import loads
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.memory import OptimizerOptions, stage_parameters

Chunk = tuple[tuple[str, StageShape], ...]
"""The parts of modules that one chunk holds."""
WHOLE = 1 << 30
"""A sub-microbatch size that splits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The model's layers in one line, cut into chunks."""

    chunks: tuple[Chunk, ...]


def layer_line(bench: Bench) -> list[tuple[str, StageShape]]:
    """Every layer of every module, in forward order."""
    return [
        (
            module.name,
            StageShape(
                layers=1, is_first=index == 0, is_last=index == module.layers - 1, first_layer=index
            ),
        )
        for module in bench.model.modules
        for index in range(module.layers)
    ]


def parameter_weights(bench: Bench) -> list[int]:
    """Parameters by layer, embeddings, projectors and heads included."""
    return [
        stage_parameters(bench.model.module(name), shape, bench.options)
        for name, shape in layer_line(bench)
    ]


def time_weights(bench: Bench) -> list[int]:
    """Mean time by layer over a batch's microbatches: what a representative batch takes (ns)."""
    totals = []
    for name, shape in layer_line(bench):
        module = bench.model.module(name)
        total = 0
        for one in bench.batches[0].microbatches:
            load = _loads(bench, one).get(name)
            if load is not None:
                keep = bench.costs.stage_strategies(module, shape, load)[0]
                total += keep.forward_ns + keep.backward_ns + keep.weight_grad_ns
        totals.append(total)
    return totals


def cut_chain(bench: Bench, chunks: int, weights: Sequence[int]) -> Chain:
    """The contiguous cut into `chunks` chunks whose heaviest chunk is lightest."""
    line = layer_line(bench)
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)

    @cache
    def best(stop: int, parts: int) -> tuple[int, int]:
        """Heaviest chunk of the first `stop` layers in `parts`; where the last one starts."""
        if parts == 1:
            return sums[stop], 0
        return min(
            (max(best(start, parts - 1)[0], sums[stop] - sums[start]), start)
            for start in range(parts - 1, stop)
        )

    stops = [len(line)]
    for parts in range(chunks, 1, -1):
        stops.append(best(stops[-1], parts)[1])
    bounds = [0, *sorted(stops)]
    return Chain(chunks=tuple(_joined(line[start:stop]) for start, stop in pairwise(bounds)))


def _joined(layers: Sequence[tuple[str, StageShape]]) -> Chunk:
    parts = []
    for name in dict.fromkeys(name for name, _ in layers):
        shapes = [shape for other, shape in layers if other == name]
        parts.append(
            (
                name,
                StageShape(
                    layers=len(shapes),
                    is_first=shapes[0].is_first,
                    is_last=shapes[-1].is_last,
                    first_layer=shapes[0].first_layer,
                ),
            )
        )
    return tuple(parts)


def chain_capacity(bench: Bench, chain: Chain) -> tuple[int, ...]:
    """Bytes for activations by rank: what states and working memory leave."""
    left = [bench.device.spec.memory_bytes] * bench.pipeline_size
    per_parameter = bench.options.element_bytes + bench.options.gradient_bytes
    state = OptimizerOptions().state_bytes  # there is one replica
    working = 0
    every = {(n, load) for b in bench.batches for m in b.microbatches
             for n, load in _loads(bench, m).items()}  # fmt: skip
    for index, chunk in enumerate(chain.chunks):
        for name, shape in chunk:
            module = bench.model.module(name)
            count = stage_parameters(module, shape, bench.options)
            left[index % bench.pipeline_size] -= count * (per_parameter + state)
            for other, load in every:
                if other == name:
                    working = max(working, bench.costs.working_bytes(module, shape, load))
    return tuple(one - working for one in left)


def chain_problem(
    bench: Bench,
    batch: BatchMetadata,
    chain: Chain,
    capacity_bytes: Sequence[int],
    recomputed: float,
) -> Problem:
    """The problem of `batch`: one pass per microbatch.

    `recomputed` is the share of every chunk's layers that is recomputed. A message costs what the
    backbone's hidden states cost, also inside of the encoder.
    """
    segments = len(chain.chunks) // bench.pipeline_size
    backbone = bench.model.backbone
    shards = bench.setup.parallel.tensor if bench.setup.parallel.sequence_parallel else 1
    microbatches = []
    for one in batch.microbatches:
        sizes = _loads(bench, one)
        hidden = one.sequence_length * one.samples * backbone.hidden_size // shards
        stages = tuple((_stage(bench, chunk, sizes, recomputed),) for chunk in chain.chunks)
        microbatches.append(
            Microbatch(
                passes=(
                    Pass(
                        module="model",
                        sub_microbatch=0,
                        p2p_latency_ns=bench.costs.p2p_latency_ns(
                            hidden * bench.options.element_bytes
                        ),
                        stages=stages,
                    ),
                )
            )
        )
    return Problem(
        pipeline_size=bench.pipeline_size,
        memory_capacity_bytes=tuple(capacity_bytes),
        modules={"model": segments},
        microbatches=tuple(microbatches),
    )


def _stage(bench: Bench, chunk: Chunk, sizes: dict[str, Load], recomputed: float) -> Strategy:
    forward_ns = backward_ns = weight_grad_ns = memory_bytes = 0
    for name, shape in chunk:
        if name not in sizes:
            continue  # a microbatch without images skips the encoder's layers
        module = bench.model.module(name)
        part = whole_run_strategy(bench.costs, module, shape, sizes[name], recomputed)
        forward_ns += part.forward_ns
        backward_ns += part.backward_ns
        weight_grad_ns += part.weight_grad_ns
        memory_bytes += part.memory_bytes
    return Strategy(
        name=f"recompute {recomputed:.0%}",
        forward_ns=forward_ns,
        backward_ns=backward_ns,
        weight_grad_ns=weight_grad_ns,
        memory_bytes=memory_bytes,
    )


def _loads(bench: Bench, one: MicrobatchMetadata) -> dict[str, Load]:
    """By module that has work: all of the microbatch's items in one pass."""
    whole = {module.name: WHOLE for module in bench.model.modules[:-1]}
    return dict(loads(BatchMetadata(microbatches=(one,)), bench.model, whole))


def megatron_order(pipeline_size: int, segments: int, microbatches: int) -> list[list[int]]:
    """Megatron-LM's 1F1B, interleaved where a rank has several chunks, as the core counts ops.

    Ranks warm up with ``P - rank - 1`` forwards, with several chunks with ``2 (P - rank - 1) +
    (V - 1) P``, then run one forward and one backward by turns; P microbatches go through one chunk
    before the next one's turn (D. Narayanan et al., SC 2021; `megatron.core`'s schedules).
    """
    size, stages = pipeline_size, pipeline_size * segments
    total = microbatches * segments

    def op(index: int, rank: int, *, backward: bool) -> int:
        group, place = divmod(index, size * segments)
        chunk, offset = divmod(place, size)
        if backward:
            chunk = segments - 1 - chunk
        pair = (group * size + offset) * stages + chunk * size + rank
        return 3 * pair + int(backward)

    ranks = []
    for rank in range(size):
        ahead = size - rank - 1
        if segments > 1:
            ahead = 2 * ahead + (segments - 1) * size
        ahead = min(ahead, total)
        order = [op(index, rank, backward=False) for index in range(ahead)]
        for index in range(total - ahead):
            order.append(op(index + ahead, rank, backward=False))
            order.append(op(index, rank, backward=True))
        order += [op(index, rank, backward=True) for index in range(total - ahead, total)]
        ranks.append(order)
    return ranks
