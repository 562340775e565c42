"""Mixture of experts: router, exchange between expert-parallel ranks, grouped matmuls."""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import ExpertOptions
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.operators import (
    INDEX_BYTES,
    Sketch,
    activation,
    elementwise,
    enter_tensor_parallel,
    leave_tensor_parallel,
    linear,
    shard,
    weight_grad_bytes,
)
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Queue, Work


def expert_mlp(
    sketch: Sketch, spec: LayerSpec, experts: ExpertOptions, rows: int, normed: str
) -> str:
    """Route, dispatch, run the experts of this rank, combine; loads are taken as balanced.

    Experts are spread over the expert-parallel ranks and each one's width over the tensor-parallel
    ranks. Every row is sent to `experts.active` experts and comes back as the sum of what they make
    of it, each weighed by its probability.
    """
    width = spec.hidden_size
    normed = enter_tensor_parallel(sketch, "enter_experts", normed, rows * width)
    scores = linear(
        sketch, "router", normed, rows=rows, width_in=width, width_out=experts.count, bias=False
    )
    probabilities = elementwise(sketch, "route", (scores,), rows * experts.count, saves=(scores,))
    routed = rows * experts.active
    indices = sketch.tensor("permute.indices", routed, INDEX_BYTES)
    sent = elementwise(sketch, "permute", (normed,), routed * width, makes=(indices,))
    sent = _exchange(sketch, "dispatch", sent)
    inner = shard(experts.ffn_hidden_size, sketch.options)
    local = -(-experts.count // sketch.options.parallel.expert)
    wide = _grouped_linear(
        sketch, "expert_fc1", sent, (routed, width, inner * (2 if spec.gated_mlp else 1)), local
    )
    active = activation(sketch, "expert_activation", wide, routed * inner, gated=spec.gated_mlp)
    # Weighed in front of the second linear, where rows are narrower: nothing behind it is kept.
    weights = sketch.tensor("weigh.probabilities", routed)
    weighed = elementwise(
        sketch,
        "weigh",
        (active, probabilities),
        routed * inner,
        saves=(active,),
        makes=(weights,),
    )
    back = _grouped_linear(sketch, "expert_fc2", weighed, (routed, inner, width), local)
    back = _exchange(sketch, "combine", back)
    output = elementwise(sketch, "unpermute", (back,), rows * width)
    if experts.shared_ffn_hidden_size is not None:
        shared = _shared_expert(sketch, spec, experts.shared_ffn_hidden_size, rows, normed)
        output = elementwise(sketch, "add_shared", (output, shared), rows * width)
    return leave_tensor_parallel(sketch, "leave_experts", output, rows * width)


def _shared_expert(sketch: Sketch, spec: LayerSpec, inner: int, rows: int, normed: str) -> str:
    inner = shard(inner, sketch.options)
    wide = linear(
        sketch,
        "shared_fc1",
        normed,
        rows=rows,
        width_in=spec.hidden_size,
        width_out=inner * (2 if spec.gated_mlp else 1),
        bias=False,
    )
    active = activation(sketch, "shared_activation", wide, rows * inner, gated=spec.gated_mlp)
    return linear(
        sketch,
        "shared_fc2",
        active,
        rows=rows,
        width_in=inner,
        width_out=spec.hidden_size,
        bias=False,
    )


def _grouped_linear(
    sketch: Sketch, name: str, source: str, sizes: tuple[int, int, int], groups: int
) -> str:
    """`groups` matmuls of ``rows / groups`` rows each; `sizes` are rows, width in, width out."""
    rows, width_in, width_out = sizes
    weight = sketch.tensor(
        f"{name}.weight", groups * width_in * width_out, parameter=True, expert=True
    )
    output = sketch.tensor(f"{name}.out", rows * width_out)
    each = max(1, rows // groups)
    flops = 2 * rows * width_in * width_out
    moved = sketch.bytes_of(source, weight, output)
    accumulated = 2 * sketch.options.gradient_bytes * groups * width_in * width_out
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.MATMUL,
            inputs=(source, weight),
            outputs=(output,),
            saves=(source, weight),
            forward=Work(
                flops=flops, memory_bytes=moved, shape=(each, width_out, width_in), count=groups
            ),
            input_grad=Work(
                flops=flops, memory_bytes=moved, shape=(each, width_in, width_out), count=groups
            ),
            weight_grad=Work(
                flops=flops,
                memory_bytes=sketch.bytes_of(source, output) + accumulated,
                shape=(width_out, width_in, each),
                count=groups,
                # One expert after another.
                scratch_bytes=weight_grad_bytes(sketch, weight) // groups,
            ),
        )
    )
    return output


def _exchange(sketch: Sketch, name: str, source: str) -> str:
    """All-to-all between the expert-parallel ranks; the backward is one too."""
    ranks = sketch.options.parallel.expert
    if ranks == 1:
        return source
    size = sketch.bytes_of(source)
    output = sketch.tensor(f"{name}.out", sketch.elements(source))
    work = Work(network_bytes=size * (ranks - 1) // ranks, memory_bytes=2 * size, steps=ranks - 1)
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ALL_TO_ALL,
            inputs=(source,),
            outputs=(output,),
            forward=work,
            input_grad=work,
            weight_grad=NO_WORK,
            queue=Queue.EXPERT_LINK,
        )
    )
    return output
