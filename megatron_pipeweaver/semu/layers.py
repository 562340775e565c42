"""Transformer layers as operator subgraphs on one tensor-parallel rank.

Heads, FFN columns and vocabulary rows are divided by the tensor-parallel size, and with sequence
parallelism so are the rows between the linears.

    hidden -> norm1 -> qkv (or latents) -> attention -> proj -> + -> [norm -> cross-attention -> +]
           -> norm2 -> MLP or experts -> +
"""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import MODULATIONS, Modulation
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.attention import (
    AttentionShape,
    attention,
    cross_pairs,
    gathered,
    pairs,
    ring_attention,
    rotary,
)
from megatron_pipeweaver.semu.experts import expert_mlp
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.latent import latent_projections
from megatron_pipeweaver.semu.operators import (
    Sketch,
    activation,
    context_rows,
    elementwise,
    enter_tensor_parallel,
    leave_tensor_parallel,
    linear,
    norm,
    shard,
    sharded_rows,
    split,
)
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.work import Subgraph


def transformer_layer(spec: LayerSpec, load: Load, options: RunOptions) -> Subgraph:
    """Pre-norm layer with whatever `spec` adds to it; the input is the tensor ``hidden``."""
    sketch = Sketch("layer", options)
    hidden = sketch.tensor(
        "hidden", sharded_rows(context_rows(load, options), options) * spec.hidden_size
    )
    if spec.modulation is not None:
        _modulation_parameters(sketch, spec, load)
    if spec.self_attention:
        hidden = _attention_block(sketch, spec, load, hidden)
    if spec.context_size is not None:
        hidden = _cross_attention_block(sketch, spec, spec.context_size, load, hidden)
    _mlp_block(sketch, spec, load, hidden)
    return sketch.finish()


def _residual(sketch: Sketch, name: str, branch: str, hidden: str) -> str:
    """Add the branch to the residual stream, behind dropout where it is on."""
    elements = sketch.elements(hidden)
    makes: tuple[str, ...] = ()
    if sketch.options.dropout:
        makes = (sketch.tensor(f"{name}.dropout_mask", elements, sketch.options.mask_bytes),)
    # Both gradients are the sum's own, that of the branch unless it goes through dropout.
    back = (hidden,) if makes else (branch, hidden)
    return elementwise(sketch, name, (branch, hidden), elements, makes=makes, hands_back=back)


def _modulation_parameters(sketch: Sketch, spec: LayerSpec, load: Load) -> None:
    """Six vectors per sequence: from a table that shifts a shared projection, or a linear."""
    width = MODULATIONS * spec.hidden_size
    if spec.modulation is Modulation.TABLE:
        sketch.tensor("modulation.table", width, parameter=True)
        return
    rows = len(load.lengths)
    time = sketch.tensor("modulation.time", rows * spec.hidden_size)
    linear(
        sketch,
        "modulation",
        time,
        rows=rows,
        width_in=spec.hidden_size,
        width_out=width,
        bias=True,
    )


_MODULATED = ((2, 2), (9, 6))
_GATED = ((2, 1), (6, 3))
"""Passes and kernels: gradients of what is scaled, and of shift and scale, or gate, added up."""


def _modulated(sketch: Sketch, spec: LayerSpec, name: str, normed: str) -> str:
    """Scale and shift behind a norm; keeps what it scales."""
    if spec.modulation is None:
        return normed
    elements = sketch.elements(normed)
    return elementwise(sketch, name, (normed,), elements, saves=(normed,), apart=_MODULATED)


def _gated(sketch: Sketch, spec: LayerSpec, name: str, branch: str) -> str:
    """Gate in front of the residual sum; keeps what it gates."""
    if spec.modulation is None:
        return branch
    elements = sketch.elements(branch)
    return elementwise(sketch, name, (branch,), elements, saves=(branch,), apart=_GATED)


def _attention_block(sketch: Sketch, spec: LayerSpec, load: Load, hidden: str) -> str:
    options = sketch.options
    rows, width = context_rows(load, options), spec.hidden_size
    heads, groups = shard(spec.heads, options), shard(spec.kv_groups, options)
    affine = spec.modulation is None
    normed = norm(
        sketch,
        "norm1",
        hidden,
        sharded_rows(rows, options),
        width,
        rms=spec.rms_norm,
        affine=affine,
    )
    normed = _modulated(sketch, spec, "modulate1", normed)
    if spec.latent is not None:
        query, key, value = latent_projections(sketch, spec, spec.latent, load, normed)
    else:
        query, key, value = _projections(sketch, spec, load, normed)
    if options.attention is Attention.DENSE:
        key, value = gathered(sketch, "gather_key", key), gathered(sketch, "gather_value", value)
        if groups < heads:
            whole_size = rows * heads * spec.head_size * options.parallel.context
            key = elementwise(sketch, "repeat_key", (key,), whole_size)
            value = elementwise(sketch, "repeat_value", (value,), whole_size)
    shape = AttentionShape(
        rows=rows,
        heads=heads,
        head_size=spec.head_size,
        value_size=spec.value_size,
        # A rank's share of the query-key pairs.
        pairs=-(
            -pairs(load, options.attention, causal=spec.causal, window=spec.window)
            // options.parallel.context
        ),
        masked=spec.causal or spec.window is not None or len(load.lengths) > load.batch,
    )
    context = ring_attention(sketch, "attention", (query, key, value), shape)
    branch = linear(
        sketch,
        "proj",
        context,
        rows=rows,
        width_in=heads * spec.value_size,
        width_out=width,
        bias=spec.bias,
    )
    branch = leave_tensor_parallel(sketch, "leave_attention", branch, rows * width)
    return _residual(sketch, "residual1", _gated(sketch, spec, "gate1", branch), hidden)


def _projections(sketch: Sketch, spec: LayerSpec, load: Load, normed: str) -> tuple[str, str, str]:
    """Query, key and value of this rank's heads, in one linear; with positions."""
    options = sketch.options
    rows, width = context_rows(load, options), spec.hidden_size
    heads, groups = shard(spec.heads, options), shard(spec.kv_groups, options)
    entered = enter_tensor_parallel(sketch, "enter_attention", normed, rows * width)
    mixed = linear(
        sketch,
        "qkv",
        entered,
        rows=rows,
        width_in=width,
        width_out=(heads + 2 * groups) * spec.head_size,
        bias=spec.qkv_bias,
        keeps=normed,
    )
    query_size, key_size = rows * heads * spec.head_size, rows * groups * spec.head_size
    query, key, value = split(
        sketch,
        "split",
        mixed,
        {"query": query_size, "key": key_size, "value": key_size},
        # With fewer groups than heads, queries do not stand side by side.
        copies=("query",) if groups < heads else (),
    )
    return *_positioned(sketch, spec, load, query, key), value


def _positioned(
    sketch: Sketch, spec: LayerSpec, load: Load, query: str, key: str
) -> tuple[str, str]:
    """Norm per head, then rotary positions, each where the layer has it."""
    if spec.qk_norm:
        names = (("query_norm", query), ("key_norm", key))
        query, key = (
            norm(
                sketch,
                name,
                source,
                sketch.elements(source) // spec.head_size,
                spec.head_size,
                rms=True,
            )
            for name, source in names
        )
    if spec.rotary:
        query = rotary(sketch, "rotary_query", query, load=load, width=spec.head_size)
        key = rotary(sketch, "rotary_key", key, load=load, width=spec.head_size)
    return query, key


def _cross_attention_block(
    sketch: Sketch, spec: LayerSpec, context_size: int, load: Load, hidden: str
) -> str:
    """Queries from the hidden states, keys and values from the context, which others hold."""
    options = sketch.options
    rows, width = context_rows(load, options), spec.hidden_size
    other_rows = sum(load.context_lengths)
    heads, groups = shard(spec.heads, options), shard(spec.kv_groups, options)
    context = sketch.tensor("context", other_rows * context_size, external=True)
    normed = norm(
        sketch, "norm_cross", hidden, sharded_rows(rows, options), width, rms=spec.rms_norm
    )
    entered = enter_tensor_parallel(sketch, "enter_cross", normed, rows * width)
    query = linear(
        sketch,
        "cross_query",
        entered,
        rows=rows,
        width_in=width,
        width_out=heads * spec.head_size,
        bias=spec.qkv_bias,
        keeps=normed,
    )
    mixed = linear(
        sketch,
        "cross_key_value",
        context,
        rows=other_rows,
        width_in=context_size,
        width_out=2 * groups * spec.head_size,
        bias=spec.qkv_bias,
    )
    key_size = other_rows * groups * spec.head_size
    key, value = split(
        sketch, "cross_split", mixed, {"cross_key": key_size, "cross_value": key_size}
    )
    if options.attention is Attention.DENSE and groups < heads:
        repeated = other_rows * heads * spec.head_size
        key = elementwise(sketch, "repeat_cross_key", (key,), repeated)
        value = elementwise(sketch, "repeat_cross_value", (value,), repeated)
    shape = AttentionShape(
        rows=rows,
        heads=heads,
        head_size=spec.head_size,
        value_size=spec.head_size,
        pairs=-(-cross_pairs(load, options.attention) // options.parallel.context),
        masked=len(load.context_lengths) > load.batch,
    )
    attended = attention(sketch, "cross_attention", (query, key, value), shape)
    branch = linear(
        sketch,
        "cross_proj",
        attended,
        rows=rows,
        width_in=heads * spec.head_size,
        width_out=width,
        bias=spec.bias,
    )
    branch = leave_tensor_parallel(sketch, "leave_cross", branch, rows * width)
    return _residual(sketch, "residual_cross", branch, hidden)


def _mlp_block(sketch: Sketch, spec: LayerSpec, load: Load, hidden: str) -> str:
    options = sketch.options
    rows, width = context_rows(load, options), spec.hidden_size
    affine = spec.modulation is None
    normed = norm(
        sketch,
        "norm2",
        hidden,
        sharded_rows(rows, options),
        width,
        rms=spec.rms_norm,
        affine=affine,
    )
    normed = _modulated(sketch, spec, "modulate2", normed)
    if spec.experts is not None:
        branch = expert_mlp(sketch, spec, spec.experts, rows, normed)
    else:
        branch = dense_mlp(sketch, spec, rows, normed)
    return _residual(sketch, "residual2", _gated(sketch, spec, "gate2", branch), hidden)


def dense_mlp(sketch: Sketch, spec: LayerSpec, rows: int, normed: str) -> str:
    """Two linears around an activation; the branch's output."""
    options = sketch.options
    width, inner = spec.hidden_size, shard(spec.ffn_hidden_size, options)
    entered = enter_tensor_parallel(sketch, "enter_mlp", normed, rows * width)
    wide = linear(
        sketch,
        "fc1",
        entered,
        rows=rows,
        width_in=width,
        width_out=inner * (2 if spec.gated_mlp else 1),
        bias=spec.bias,
        keeps=normed,
    )
    active = activation(sketch, "activation", wide, rows * inner, gated=spec.gated_mlp)
    branch = linear(
        sketch, "fc2", active, rows=rows, width_in=inner, width_out=width, bias=spec.bias
    )
    return leave_tensor_parallel(sketch, "leave_mlp", branch, rows * width)
