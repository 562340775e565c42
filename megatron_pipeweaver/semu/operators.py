"""Operators with their exact matrix FLOPs and bytes: forward, input and weight gradient apart.

Only matrix products count as FLOPs, as in a model's MFU; norms, activations and sums are bound by
the bytes they move. A `Sketch` collects operators and tensors into a `Subgraph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.work import (
    NO_WORK,
    Operator,
    OperatorClass,
    Queue,
    Subgraph,
    Tensor,
    Work,
)

INDEX_BYTES = 8
"""Token ids, targets and places of rows are 64-bit integers."""
STATISTIC_BYTES = 4
"""Row statistics (mean, inverse deviation, log-sum-exp) are kept in single precision."""


@dataclass(slots=True)
class Sketch:
    """A subgraph in the making: tensors are named by strings, operators stand in order."""

    name: str
    options: RunOptions
    operators: list[Operator] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def tensor(
        self,
        name: str,
        elements: int,
        element_bytes: int | None = None,
        *,
        parameter: bool = False,
        external: bool = False,
        base: str | None = None,
        expert: bool = False,
    ) -> str:
        """Add a tensor, or a view of `base`; returns its name."""
        bases = {one.name: one.base for one in self.tensors}
        base = bases.get(base) or base if base is not None else None
        self.tensors.append(
            Tensor(
                name=name,
                elements=elements,
                element_bytes=element_bytes or self.options.element_bytes,
                parameter=parameter,
                external=external,
                base=base,
                expert=expert,
            )
        )
        return name

    def elements(self, name: str) -> int:
        """How many elements the tensor called `name` has."""
        return next(one.elements for one in self.tensors if one.name == name)

    def bytes_of(self, *names: str) -> int:
        """Bytes of the tensors called `names`, together."""
        return sum(one.size_bytes for one in self.tensors if one.name in names)

    def finish(self) -> Subgraph:
        """The subgraph."""
        return Subgraph(
            name=self.name, operators=tuple(self.operators), tensors=tuple(self.tensors)
        )


def weight_grad_bytes(sketch: Sketch, weight: str) -> int:
    """What a gradient takes until it is added to the weight's buffer."""
    return 0 if sketch.options.fused_linear else sketch.bytes_of(weight)


def linear(
    sketch: Sketch,
    name: str,
    source: str,
    *,
    rows: int,
    width_in: int,
    width_out: int,
    bias: bool,
    needs_input_grad: bool = True,
    keeps: str | None = None,
    owns_weight: bool = True,
) -> str:
    """``[rows, width_in] x [width_in, width_out]``; keeps its input, or the tensor `keeps`.

    Where linears are not fused, the bias is added by an operator of its own, ``name:bias``.
    """
    weight = sketch.tensor(
        f"{name}.weight", width_in * width_out, parameter=owns_weight, external=not owns_weight
    )
    parameters: tuple[str, ...] = (weight,)
    apart = bias and not sketch.options.fused_linear
    if bias:
        parameters += (sketch.tensor(f"{name}.bias", width_out, parameter=True),)
    output = sketch.tensor(f"{name}.product" if apart else f"{name}.out", rows * width_out)
    flops = 2 * rows * width_in * width_out
    size = sketch.options.element_bytes
    moved = size * (rows * width_in + width_in * width_out + rows * width_out)
    accumulated = 2 * sketch.options.gradient_bytes * width_in * width_out
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.MATMUL,
            inputs=(source, *parameters[: 1 if apart else 2]),
            outputs=(output,),
            saves=(keeps or source, weight),
            forward=Work(flops=flops, memory_bytes=moved, shape=(rows, width_out, width_in)),
            input_grad=(
                Work(flops=flops, memory_bytes=moved, shape=(rows, width_in, width_out))
                if needs_input_grad
                else NO_WORK
            ),
            weight_grad=Work(
                flops=flops,
                memory_bytes=size * rows * (width_in + width_out) + accumulated,
                shape=(width_out, width_in, rows),
                scratch_bytes=weight_grad_bytes(sketch, weight),
            ),
        )
    )
    return _biased(sketch, name, output, parameters[-1]) if apart else output


def _biased(sketch: Sketch, name: str, product: str, bias: str) -> str:
    """The sum of a linear's product and its bias, whose gradient adds up the rows."""
    output = sketch.tensor(f"{name}.out", sketch.elements(product))
    size_bytes = sketch.bytes_of(product)
    sketch.operators.append(
        Operator(
            name=f"{name}:bias",
            kind=OperatorClass.ELEMENTWISE,
            inputs=(product, bias),
            outputs=(output,),
            forward=Work(memory_bytes=2 * size_bytes),
            weight_grad=Work(memory_bytes=size_bytes),
            hands_back=(product,),
        )
    )
    return output


def embedding(sketch: Sketch, tokens: str, weight: str, *, rows: int, width: int) -> str:
    """Rows of the table `weight` looked up; the backward makes a gradient of the whole table."""
    output = sketch.tensor("embedding.out", rows * width)
    moved, table = sketch.bytes_of(output), sketch.elements(weight)
    options = sketch.options
    sketch.operators.append(
        Operator(
            name="embedding",
            kind=OperatorClass.EMBEDDING,
            inputs=(tokens, weight),
            outputs=(output,),
            saves=(tokens,),
            forward=Work(memory_bytes=2 * moved),
            # Filled with zeros, added into row by row, added to its buffer.
            weight_grad=Work(
                memory_bytes=3 * moved
                + 2 * table * (options.element_bytes + options.gradient_bytes),
                kernels=3,
                scratch_bytes=sketch.bytes_of(weight),
            ),
        )
    )
    return output


_NORM_FUSED = ((2, 1), (3, 1), (2, 1))
"""Passes over the tensor, and kernels: forward, input gradient, weight gradient."""
_RMS_NORM_APART = ((7, 6), (19, 12), (4, 2))
"""Square, mean, root, two products; their gradients are elementwise operators as well."""


def norm(
    sketch: Sketch,
    name: str,
    source: str,
    rows: int,
    width: int,
    *,
    rms: bool,
    affine: bool = True,
) -> str:
    """Layer norm or RMS norm over `width`; keeps its input and one or two numbers per row."""
    parameters: list[str] = []
    if affine:
        parameters.append(sketch.tensor(f"{name}.weight", width, parameter=True))
    if affine and not rms:
        parameters.append(sketch.tensor(f"{name}.bias", width, parameter=True))
    kept = sketch.tensor(f"{name}.statistics", rows if rms else 2 * rows, STATISTIC_BYTES)
    saves = [source, kept, *parameters[:1]]
    made = [kept]
    if rms and not sketch.options.fused_norm:
        made.append(sketch.tensor(f"{name}.scaled", rows * width))
        saves.append(made[-1])
    output = sketch.tensor(f"{name}.out", rows * width)
    moved = rows * width * sketch.options.element_bytes
    apart = rms and not sketch.options.fused_norm
    works = _RMS_NORM_APART if apart else _NORM_FUSED
    forward, input_grad, weight_grad = (
        Work(memory_bytes=passes * moved, kernels=kernels) for passes, kernels in works
    )
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ELEMENTWISE if apart else OperatorClass.NORM,
            inputs=(source, *parameters),
            outputs=(output, *made),
            saves=tuple(saves),
            forward=forward,
            input_grad=input_grad,
            weight_grad=weight_grad if affine else NO_WORK,
        )
    )
    return output


Apart = tuple[tuple[int, int], tuple[int, int]]
"""Passes over the output's bytes, and kernels: forward, input gradient."""


def elementwise(
    sketch: Sketch,
    name: str,
    sources: tuple[str, ...],
    elements: int,
    *,
    saves: tuple[str, ...] = (),
    makes: tuple[str, ...] = (),
    backward: bool = True,
    kind: OperatorClass = OperatorClass.ELEMENTWISE,
    apart: Apart | None = None,
    hands_back: tuple[str, ...] = (),
) -> str:
    """Any operator that reads its sources once and writes `elements`.

    It keeps `saves`, and `makes`, which it writes for its backward alone. Several kernels in place
    of one make more passes over the output's size: `apart`.
    """
    output = sketch.tensor(f"{name}.out", elements)
    moved = sketch.bytes_of(*sources, output)
    kept = saves + makes
    forward = Work(memory_bytes=moved + sketch.bytes_of(*makes))
    input_grad = Work(memory_bytes=moved + sketch.bytes_of(*kept))
    if apart is not None:
        one = sketch.bytes_of(output)
        forward, input_grad = (
            Work(memory_bytes=passes * one, kernels=kernels) for passes, kernels in apart
        )
    sketch.operators.append(
        Operator(
            name=name,
            kind=kind,
            inputs=sources,
            outputs=(output, *makes),
            saves=kept,
            forward=forward,
            input_grad=input_grad if backward else NO_WORK,
            hands_back=hands_back,
        )
    )
    return output


_SWIGLU_APART = ((7, 3), (13, 4))
"""SiLU, offset, product; products, gradient of SiLU, joined halves."""


def activation(sketch: Sketch, name: str, source: str, elements: int, *, gated: bool) -> str:
    """GELU, or SwiGLU of the two halves of `source`; keeps its input."""
    apart = gated and not sketch.options.fused_activation
    makes: tuple[str, ...] = ()
    if apart:
        # Megatron's own: the activated half, and the other one with an offset added.
        makes = (sketch.tensor(f"{name}.gate", elements), sketch.tensor(f"{name}.up", elements))
    return elementwise(
        sketch,
        name,
        (source,),
        elements,
        saves=(source,),
        makes=makes,
        kind=OperatorClass.GATED_ACTIVATION if gated else OperatorClass.ACTIVATION,
        apart=_SWIGLU_APART if apart else None,
    )


def split(
    sketch: Sketch,
    name: str,
    source: str,
    sizes: Mapping[str, int],
    copies: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Parts of `source` by name: views, except `copies`; the backward joins their gradients."""
    parts = tuple(
        sketch.tensor(part, elements, base=None if part in copies else source)
        for part, elements in sizes.items()
    )
    copied = 2 * sketch.bytes_of(*copies)
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ELEMENTWISE,
            inputs=(source,),
            outputs=parts,
            forward=Work(memory_bytes=copied) if copies else NO_WORK,
            input_grad=Work(memory_bytes=2 * sketch.bytes_of(source)),
        )
    )
    return parts


def shard(size: int, options: RunOptions) -> int:
    """A tensor-parallel rank's share of `size` heads, columns or vocabulary rows."""
    return -(-size // options.parallel.tensor)


def context_rows(load: Load, options: RunOptions) -> int:
    """Tokens of `load` on one context-parallel rank."""
    return -(-load.tokens // options.parallel.context)


def sharded_rows(rows: int, options: RunOptions) -> int:
    """Rows that a rank holds between the linears: its share with sequence parallelism."""
    parallel = options.parallel
    return -(-rows // parallel.tensor) if parallel.sequence_parallel else rows


@dataclass(frozen=True, slots=True)
class _Ring:
    """Bytes and messages of a ring collective over `ranks`, as shares of the whole tensor."""

    passes: int

    def work(self, size_bytes: int, ranks: int) -> Work:
        """What one rank sends for a tensor of `size_bytes` (the whole one)."""
        return Work(
            network_bytes=self.passes * size_bytes * (ranks - 1) // ranks,
            memory_bytes=2 * self.passes * size_bytes,
            steps=self.passes * (ranks - 1),
        )


_RINGS = {
    OperatorClass.ALL_REDUCE: _Ring(2),
    OperatorClass.ALL_GATHER: _Ring(1),
    OperatorClass.REDUCE_SCATTER: _Ring(1),
}
_BACKWARD = {
    OperatorClass.ALL_GATHER: OperatorClass.REDUCE_SCATTER,
    OperatorClass.REDUCE_SCATTER: OperatorClass.ALL_GATHER,
}


def collective_work(kind: OperatorClass, size_bytes: int, ranks: int) -> Work:
    """A ring collective on one rank; `size_bytes` is the whole, unsharded tensor."""
    return NO_WORK if ranks == 1 else _RINGS[kind].work(size_bytes, ranks)


def host_copy(size_bytes: int) -> Operator:
    """A copy of `size_bytes` to the host, or back; outside of any subgraph."""
    return Operator(
        name="host_copy",
        kind=OperatorClass.HOST_COPY,
        inputs=(),
        outputs=(),
        forward=Work(network_bytes=size_bytes, steps=1),
        queue=Queue.HOST_LINK,
    )


def enter_tensor_parallel(sketch: Sketch, name: str, source: str, elements: int) -> str:
    """In front of a column-parallel linear: all-gather with sequence parallelism, else a copy.

    The backward is a reduce-scatter or an all-reduce. `elements` are those of the whole tensor.
    """
    parallel = sketch.options.parallel
    if parallel.tensor == 1:
        return source
    size = elements * sketch.options.element_bytes
    if not parallel.sequence_parallel:
        reduce = collective_work(OperatorClass.ALL_REDUCE, size, parallel.tensor)
        output = sketch.tensor(f"{name}.out", elements, base=source)
        works = (NO_WORK, reduce, NO_WORK)
        _collective(sketch, name, OperatorClass.ALL_REDUCE, (source, output), works)
        return output
    output = sketch.tensor(f"{name}.gathered", elements)
    gather = collective_work(OperatorClass.ALL_GATHER, size, parallel.tensor)
    scatter = collective_work(OperatorClass.REDUCE_SCATTER, size, parallel.tensor)
    _collective(sketch, name, OperatorClass.ALL_GATHER, (source, output), (gather, scatter, gather))
    return output


def leave_tensor_parallel(sketch: Sketch, name: str, source: str, elements: int) -> str:
    """Behind a row-parallel linear: reduce-scatter with sequence parallelism, else all-reduce."""
    parallel = sketch.options.parallel
    if parallel.tensor == 1:
        return source
    size = elements * sketch.options.element_bytes
    if not parallel.sequence_parallel:
        reduce = collective_work(OperatorClass.ALL_REDUCE, size, parallel.tensor)
        output = sketch.tensor(f"{name}.out", elements, base=source)
        works = (reduce, NO_WORK, NO_WORK)
        _collective(sketch, name, OperatorClass.ALL_REDUCE, (source, output), works)
        return output
    output = sketch.tensor(f"{name}.scattered", -(-elements // parallel.tensor))
    scatter = collective_work(OperatorClass.REDUCE_SCATTER, size, parallel.tensor)
    gather = collective_work(OperatorClass.ALL_GATHER, size, parallel.tensor)
    _collective(
        sketch, name, OperatorClass.REDUCE_SCATTER, (source, output), (scatter, gather, NO_WORK)
    )
    return output


def _collective(
    sketch: Sketch,
    name: str,
    kind: OperatorClass,
    ends: tuple[str, str],
    works: tuple[Work, Work, Work],
) -> None:
    source, output = ends
    forward, input_grad, weight_grad = works
    sketch.operators.append(
        Operator(
            name=name,
            kind=kind,
            inputs=(source,),
            outputs=(output,),
            forward=forward,
            input_grad=input_grad,
            weight_grad=weight_grad,
            queue=Queue.TENSOR_LINK,
        )
    )
