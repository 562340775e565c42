"""Attention as operators: which query-key pairs count, what each form computes and keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.operators import (
    STATISTIC_BYTES,
    Sketch,
    collective_work,
    elementwise,
)
from megatron_pipeweaver.semu.options import Attention
from megatron_pipeweaver.semu.work import (
    Operator,
    OperatorClass,
    Queue,
    Work,
)


def pairs(load: Load, kind: Attention, *, causal: bool, window: int | None = None) -> int:
    """Query-key pairs that self-attention computes, per head.

    Dense attention computes the full square of every row of the batch; fused attention stays
    within the sequences and, when causal, below their diagonals. Windows cut sequences where
    attention looks both ways; where it is causal they slide, a query's own place at their end.
    """
    if kind is Attention.DENSE:
        return load.batch * load.sequence * load.sequence
    if causal:
        wide = [min(length, window or length) for length in load.lengths]
        return sum(
            seen * (seen + 1) // 2 + (length - seen) * seen
            for length, seen in zip(load.lengths, wide, strict=True)
        )
    if window is None:
        return sum(length * length for length in load.lengths)
    return sum(
        (length // window) * window * window + (length % window) ** 2 for length in load.lengths
    )


def cross_pairs(load: Load, kind: Attention) -> int:
    """Query-key pairs of cross-attention, per head.

    Every sequence reads its own context where there is one each, the whole context otherwise.
    Dense attention does so row by row of the batch, padding included.
    """
    context = load.context_lengths
    if kind is Attention.FLASH and len(context) == len(load.lengths):
        return sum(own * other for own, other in zip(load.lengths, context, strict=True))
    if len(context) == load.batch:
        return load.sequence * sum(context)
    return load.tokens * sum(context)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes of one attention on one rank; `pairs` are query-key pairs per head.

    Queries and keys are `head_size` wide, values and what comes out `value_size`. Where nothing is
    `masked` out, dense attention does not fill scores in.
    """

    rows: int
    heads: int
    head_size: int
    value_size: int
    pairs: int
    masked: bool = True

    @property
    def output_elements(self) -> int:
        """Elements of what attention hands on."""
        return self.rows * self.heads * self.value_size

    def fused(self, pairs: int, moved_bytes: int) -> tuple[Work, Work]:
        """The fused kernel's forward and input gradient for `pairs` of the query-key pairs.

        The backward computes the scores once more: three products as wide as the keys and two as
        wide as the values, for the forward's one each.
        """
        each = 2 * self.heads * pairs
        sizes = (self.rows, max(1, pairs // max(1, self.rows)), self.head_size)
        return (
            Work(
                flops=each * (self.head_size + self.value_size),
                memory_bytes=moved_bytes,
                shape=sizes,
                count=self.heads,
            ),
            Work(
                flops=each * (3 * self.head_size + 2 * self.value_size),
                memory_bytes=2 * moved_bytes,
                shape=sizes,
                count=self.heads,
            ),
        )


def attention(
    sketch: Sketch, name: str, sources: tuple[str, str, str], shape: AttentionShape
) -> str:
    """Softmax attention of query, key and value, as `RunOptions.attention` has it run.

    The `shape` is that of one rank; with context parallelism see `ring_attention` and `gathered`.
    """
    if sketch.options.attention is Attention.DENSE:
        return _dense_attention(sketch, name, sources, shape)
    query, key, value = sources
    output = sketch.tensor(f"{name}.out", shape.output_elements)
    statistics = sketch.tensor(f"{name}.statistics", shape.rows * shape.heads, STATISTIC_BYTES)
    moved = sketch.bytes_of(query, key, value, output)
    forward, input_grad = shape.fused(shape.pairs, moved)
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ATTENTION,
            inputs=sources,
            outputs=(output, statistics),
            saves=(*sources, output, statistics),
            forward=forward,
            input_grad=input_grad,
        )
    )
    return output


def ring_attention(
    sketch: Sketch, name: str, sources: tuple[str, str, str], shape: AttentionShape
) -> str:
    """Attention of a share of the queries to all keys, whose blocks go round the ring.

        compute       | own block | block 1 ----- | block 2 ----- |
        context link  | block 1 - | block 2 - |

    While a rank works on one block of keys and values, the next one comes in. The backward sends
    the blocks round again, and their gradients with them. The query-key pairs are dealt evenly, as
    Megatron deals causal sequences (front and back chunks together); they are those of this rank.
    """
    ranks = sketch.options.parallel.context
    if ranks == 1 or sketch.options.attention is Attention.DENSE:
        return attention(sketch, name, sources, shape)
    query, *block = sources
    before: tuple[str, ...] = ()
    for step in range(ranks):
        if step:
            block = [_ring_step(sketch, f"{name}_ring:{step}", tuple(block))]
        last = step == ranks - 1
        output = f"{name}.out" if last else f"{name}:{step}.out"
        sketch.tensor(output, shape.output_elements)
        statistics = f"{name}.statistics" if last else f"{name}:{step}.statistics"
        sketch.tensor(statistics, shape.rows * shape.heads, STATISTIC_BYTES)
        pairs_here = shape.pairs * (step + 1) // ranks - shape.pairs * step // ranks
        moved = sketch.bytes_of(query, *block, *before, output)
        forward, input_grad = shape.fused(pairs_here, moved)
        sketch.operators.append(
            Operator(
                name=f"{name}:{step}",
                kind=OperatorClass.ATTENTION,
                inputs=(query, *block, *before),
                outputs=(output, statistics),
                saves=(*sources, output, statistics) if last else (),
                forward=forward,
                input_grad=input_grad,
            )
        )
        before = (output, statistics)
    return before[0]


def gathered(sketch: Sketch, name: str, share: str) -> str:
    """Keys or values of all context-parallel ranks, as dense attention wants them.

    They are gathered before attention begins and kept whole, and put in order of the sequence; the
    gradients are put back, summed up and scattered.
    """
    ranks = sketch.options.parallel.context
    if ranks == 1:
        return share
    elements = sketch.elements(share) * ranks
    output = sketch.tensor(f"{name}.gathered", elements)
    size = elements * sketch.options.element_bytes
    gather = collective_work(OperatorClass.ALL_GATHER, size, ranks)
    scatter = collective_work(OperatorClass.REDUCE_SCATTER, size, ranks)
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ALL_GATHER,
            inputs=(share,),
            outputs=(output,),
            forward=replace(gather, memory_bytes=gather.memory_bytes + 2 * size),
            input_grad=replace(scatter, memory_bytes=scatter.memory_bytes + 2 * size),
            queue=Queue.CONTEXT_LINK,
        )
    )
    return output


def _ring_step(sketch: Sketch, name: str, block: tuple[str, ...]) -> str:
    """Hand a block of keys and values on to the next rank and take one from the one before."""
    size = sketch.bytes_of(*block)
    output = sketch.tensor(f"{name}.out", size // sketch.options.element_bytes)
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.RING_EXCHANGE,
            inputs=block,
            outputs=(output,),
            forward=Work(network_bytes=size, memory_bytes=2 * size, steps=1),
            input_grad=Work(network_bytes=2 * size, memory_bytes=4 * size, steps=1),
            queue=Queue.CONTEXT_LINK,
        )
    )
    return output


def _dense_attention(
    sketch: Sketch, name: str, sources: tuple[str, str, str], shape: AttentionShape
) -> str:
    """Megatron's own: scores, softmax, context; the probabilities are kept."""
    query, key, value = sources
    options = sketch.options
    elements = shape.heads * shape.pairs
    scores = sketch.tensor(f"{name}_scores.out", elements)
    sizes = (shape.rows, max(1, shape.pairs // max(1, shape.rows)), shape.head_size)
    _product(sketch, f"{name}_scores", (query, key), scores, shape, shape.head_size, sizes)
    probabilities = sketch.tensor(f"{name}.probabilities", elements)
    makes = [probabilities]
    if options.dropout:
        makes.append(sketch.tensor(f"{name}.dropped", elements))
        makes.append(sketch.tensor(f"{name}.dropout_mask", elements, options.mask_bytes))
    moved = sketch.bytes_of(scores)
    works = (Work(memory_bytes=2 * moved), Work(memory_bytes=3 * moved))
    if shape.masked:
        # Scores are filled in where they stand, through a view: its gradient is copied four times.
        works = (
            Work(memory_bytes=4 * moved, kernels=2),
            Work(memory_bytes=14 * moved, kernels=7, scratch_bytes=moved),
        )
    sketch.operators.append(
        Operator(
            name=f"{name}_softmax",
            kind=OperatorClass.SOFTMAX,
            inputs=(scores,),
            outputs=tuple(makes),
            saves=tuple(makes),
            forward=works[0],
            input_grad=works[1],
        )
    )
    output = sketch.tensor(f"{name}.out", shape.output_elements)
    weights = makes[1] if options.dropout else probabilities
    turned = (shape.rows, shape.value_size, sizes[1])
    _product(sketch, f"{name}_context", (weights, value), output, shape, shape.value_size, turned)
    return output


def _product(
    sketch: Sketch,
    name: str,
    sources: tuple[str, str],
    output: str,
    shape: AttentionShape,
    width: int,
    sizes: tuple[int, int, int],
) -> None:
    """One batched product of attention, `width` channels a pair; its backward is two."""
    flops = 2 * shape.heads * shape.pairs * width
    moved = sketch.bytes_of(*sources, output)
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ATTENTION,
            inputs=sources,
            outputs=(output,),
            saves=sources,
            forward=Work(flops=flops, memory_bytes=moved, shape=sizes, count=shape.heads),
            input_grad=Work(
                flops=2 * flops, memory_bytes=2 * moved, shape=sizes, count=shape.heads, kernels=2
            ),
        )
    )


_ROTARY_APART = ((12, 9), (14, 10))
"""Cosine, sine, half turned and joined, two products, their sum, joined to what is not turned."""
_INTERLEAVED_APART = ((14, 10), (21, 15))
"""The same behind even and odd channels, joined as halves; their gradients are filled in apart."""


def rotary(
    sketch: Sketch, name: str, source: str, *, load: Load, width: int, interleaved: bool = False
) -> str:
    """Rotated positions of heads of `width` channels.

    Unfused, they keep their sines and cosines, one row per position; where pairs are `interleaved`
    channels, these are sorted first.
    """
    options = sketch.options
    makes: tuple[str, ...] = ()
    if not options.fused_rotary:
        angles = -(-load.sequence // options.parallel.context) * width
        makes = (sketch.tensor(f"{name}.cos", angles), sketch.tensor(f"{name}.sin", angles))
    apart = _INTERLEAVED_APART if interleaved else _ROTARY_APART
    return elementwise(
        sketch,
        name,
        (source,),
        sketch.elements(source),
        makes=makes,
        apart=None if options.fused_rotary else apart,
    )
