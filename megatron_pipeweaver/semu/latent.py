"""Multi-head latent attention (DeepSeek-V2): queries, keys and values out of narrow latents.

    normed -> query_down -> norm -> query_up ----> content | positions, turned -> query
    normed -> kv_down ----> norm -> kv_up -------> content | ------------------> key
                      `---> positions, turned ------------ | for every head ---^
                                                   value   | ------------------> value

Where queries have no latent, `query_up` reads what is normed in front of attention. The rest of
attention is that of any layer.
"""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import LatentOptions
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.attention import rotary
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.operators import (
    Sketch,
    collective_work,
    context_rows,
    elementwise,
    enter_tensor_parallel,
    linear,
    norm,
    shard,
    sharded_rows,
    split,
)
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Queue, Work


def latent_projections(
    sketch: Sketch, spec: LayerSpec, latent: LatentOptions, load: Load, normed: str
) -> tuple[str, str, str]:
    """Query, key and value of this rank's heads, made of `normed`."""
    rows, heads = context_rows(load, sketch.options), shard(spec.heads, sketch.options)
    query_latent, width = normed, spec.hidden_size
    if latent.query_rank is not None:
        width = latent.query_rank
        query_latent = _down(sketch, "query_down", normed, rows, (spec.hidden_size, width))
        query_latent = _normed(sketch, spec, "query", query_latent, width)
    wide_query = _up(sketch, "query_up", query_latent, rows, (width, heads * spec.head_size))
    joint = _down(
        sketch,
        "kv_down",
        normed,
        rows,
        (spec.hidden_size, latent.kv_rank + latent.rotary_size),
    )
    kv_latent, positions = _parted(sketch, latent, rows, joint)
    kv_latent = _normed(sketch, spec, "kv", kv_latent, latent.kv_rank)
    width = heads * (latent.head_size + latent.value_size)
    key_value = _up(sketch, "kv_up", kv_latent, rows, (latent.kv_rank, width))
    made = (wide_query, key_value, positions)
    if sketch.options.fused_rotary:
        return _turned_in_place(sketch, latent, rows * heads, made)
    return _turned_apart(sketch, latent, load, rows * heads, made)


def _divides_down_projections(options: RunOptions) -> bool:
    """Megatron's own layers do so among tensor-parallel ranks.

    Transformer Engine's hold them whole, and work on a rank's share of the rows with sequence
    parallelism.
    """
    return options.attention is Attention.DENSE and options.parallel.tensor > 1


def _down(sketch: Sketch, name: str, normed: str, rows: int, widths: tuple[int, int]) -> str:
    """From hidden states to a latent, which every tensor-parallel rank has in its full width."""
    width_in, width_out = widths
    options = sketch.options
    if not _divides_down_projections(options):
        rows = sharded_rows(rows, options)
        return linear(
            sketch, name, normed, rows=rows, width_in=width_in, width_out=width_out, bias=False
        )
    entered = enter_tensor_parallel(sketch, f"enter_{name}", normed, rows * width_in)
    part = linear(
        sketch,
        name,
        entered,
        rows=rows,
        width_in=width_in,
        width_out=shard(width_out, options),
        bias=False,
        keeps=normed,
    )
    size = rows * width_out * options.element_bytes
    return _on_tensor_link(
        sketch,
        f"gather_{name}",
        part,
        sketch.tensor(f"{name}.gathered", rows * width_out),
        (collective_work(OperatorClass.ALL_GATHER, size, options.parallel.tensor), NO_WORK),
    )


def _parted(sketch: Sketch, latent: LatentOptions, rows: int, joint: str) -> tuple[str, str]:
    """The latent of keys and values, and the keys' channels with positions, of all rows."""
    options = sketch.options
    all_rows = sketch.elements(joint) // (latent.kv_rank + latent.rotary_size)
    kv_latent, positions = split(
        sketch,
        "latent_split",
        joint,
        {"kv_latent": all_rows * latent.kv_rank, "positions": all_rows * latent.rotary_size},
    )
    if not _divides_down_projections(options):
        entered = enter_tensor_parallel(
            sketch, "enter_positions", positions, rows * latent.rotary_size
        )
        return kv_latent, entered
    # Every rank has them already; their gradients are those of its own heads.
    size = sketch.bytes_of(positions)
    all_reduce = collective_work(OperatorClass.ALL_REDUCE, size, options.parallel.tensor)
    whole = sketch.tensor("positions.whole", sketch.elements(positions), base=joint)
    return kv_latent, _on_tensor_link(
        sketch, "share_positions", positions, whole, (NO_WORK, all_reduce)
    )


def _normed(sketch: Sketch, spec: LayerSpec, name: str, source: str, width: int) -> str:
    """A latent behind its norm, if it has one, on a rank's share of the rows."""
    options = sketch.options
    if _divides_down_projections(options) and options.parallel.sequence_parallel:
        elements = sharded_rows(sketch.elements(source) // width, options) * width
        size = sketch.bytes_of(source)
        source = _on_tensor_link(
            sketch,
            f"scatter_{name}",
            source,
            sketch.tensor(f"{name}.share", elements, base=source),
            (NO_WORK, collective_work(OperatorClass.ALL_GATHER, size, options.parallel.tensor)),
        )
    if not spec.qk_norm:
        return source
    # Transformer Engine's norms are parts of the linears behind them, and run again with these.
    part_of = "latent" if options.attention is Attention.DENSE else "up"
    rows = sketch.elements(source) // width
    return norm(sketch, f"{name}_{part_of}_norm", source, rows, width, rms=spec.rms_norm)


def _up(sketch: Sketch, name: str, source: str, rows: int, widths: tuple[int, int]) -> str:
    """From a latent to all of this rank's heads."""
    width_in, width_out = widths
    entered = enter_tensor_parallel(sketch, f"enter_{name}", source, rows * width_in)
    return linear(
        sketch,
        name,
        entered,
        rows=rows,
        width_in=width_in,
        width_out=width_out,
        bias=False,
        keeps=source,
    )


def _turned_apart(
    sketch: Sketch, latent: LatentOptions, load: Load, each: int, sources: tuple[str, str, str]
) -> tuple[str, str, str]:
    """Rotary positions on their channels alone, which are then joined to those without.

    `each` is how many heads of tokens there are.
    """
    wide_query, key_value, positions = sources
    width = latent.rotary_size
    content, turning = split(
        sketch,
        "query_split",
        wide_query,
        {"query.content": each * latent.head_size, "query.positions": each * width},
    )
    turned = rotary(sketch, "rotary_query", turning, load=load, width=width, interleaved=True)
    query = _joined(sketch, "join_query", (content, turned), sketch.elements(wide_query))
    content, value = split(
        sketch,
        "kv_split",
        key_value,
        {"key.content": each * latent.head_size, "value.view": each * latent.value_size},
    )
    turned = rotary(sketch, "rotary_key", positions, load=load, width=width, interleaved=True)
    key = _joined(
        sketch, "join_key", (content, turned), each * (latent.head_size + latent.rotary_size)
    )
    return (
        query,
        key,
        elementwise(sketch, "copy_value", (value,), sketch.elements(value), backward=False),
    )


def _joined(sketch: Sketch, name: str, parts: tuple[str, str], elements: int) -> str:
    """Channels with positions behind those without, for every head.

    The gradients are views of that of the whole; where heads share a part, they are summed up.
    """
    content, turned = parts
    output = sketch.tensor(f"{name}.out", elements)
    each_head = elements - sketch.elements(content)
    summed = each_head + sketch.elements(turned) if each_head > sketch.elements(turned) else 0
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ELEMENTWISE,
            inputs=parts,
            outputs=(output,),
            forward=Work(memory_bytes=sketch.bytes_of(*parts, output)),
            input_grad=(
                Work(memory_bytes=summed * sketch.options.element_bytes) if summed else NO_WORK
            ),
        )
    )
    return output


def _turned_in_place(
    sketch: Sketch, latent: LatentOptions, each: int, sources: tuple[str, str, str]
) -> tuple[str, str, str]:
    """Megatron's fused kernels: queries are turned where they stand, keys and values written."""
    wide_query, key_value, positions = sources
    query = sketch.tensor("query", sketch.elements(wide_query), base=wide_query)
    turned = Work(memory_bytes=2 * each * latent.rotary_size * sketch.options.element_bytes)
    key = sketch.tensor("key", each * (latent.head_size + latent.rotary_size))
    value = sketch.tensor("value", each * latent.value_size)
    written = Work(memory_bytes=sketch.bytes_of(key_value, positions, key, value))
    for name, inputs, outputs, work in (
        ("turn_query", (wide_query,), (query,), turned),
        ("turn_key_value", (key_value, positions), (key, value), written),
    ):
        sketch.operators.append(
            Operator(
                name=name,
                kind=OperatorClass.ELEMENTWISE,
                inputs=inputs,
                outputs=outputs,
                forward=work,
                input_grad=work,
            )
        )
    return query, key, value


def _on_tensor_link(
    sketch: Sketch, name: str, source: str, output: str, works: tuple[Work, Work]
) -> str:
    """A collective of the forward, or of the backward alone, between tensor-parallel ranks."""
    forward, input_grad = works
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ALL_GATHER,
            inputs=(source,),
            outputs=(output,),
            forward=forward,
            input_grad=input_grad,
            queue=Queue.TENSOR_LINK,
        )
    )
    return output
