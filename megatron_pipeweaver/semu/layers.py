"""Transformer layers, embeddings, projectors and heads as operator subgraphs on one rank.

Sizes are those of one tensor-parallel rank: heads, FFN columns and vocabulary rows are divided by
the tensor-parallel size, and with sequence parallelism so are the rows between the linears.
"""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.operators import (
    AttentionShape,
    Sketch,
    attention,
    elementwise,
    enter_tensor_parallel,
    leave_tensor_parallel,
    linear,
    norm,
    pairs,
)
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Subgraph, Work


def transformer_layer(spec: LayerSpec, load: Load, options: RunOptions) -> Subgraph:
    """Pre-norm layer: ``x + proj(attention(norm(x)))``, then ``x + mlp(norm(x))``."""
    sketch = Sketch("layer", options)
    rows = load.tokens
    hidden = sketch.tensor("hidden", _sharded(rows, options) * spec.hidden_size)
    hidden = _attention_block(sketch, spec, load, hidden)
    _mlp_block(sketch, spec, rows, hidden)
    return sketch.finish()


def _sharded(rows: int, options: RunOptions) -> int:
    parallel = options.parallel
    return -(-rows // parallel.tensor) if parallel.sequence_parallel else rows


def _shard(size: int, options: RunOptions) -> int:
    return -(-size // options.parallel.tensor)


def _residual(sketch: Sketch, name: str, branch: str, hidden: str) -> str:
    """Add the branch to the residual stream, behind dropout where it is on."""
    elements = sketch.elements(hidden)
    saves: tuple[str, ...] = ()
    if sketch.options.dropout:
        saves = (sketch.tensor(f"{name}.dropout_mask", elements, 1),)
    return elementwise(sketch, name, (branch, hidden), elements, saves=saves)


def _attention_block(sketch: Sketch, spec: LayerSpec, load: Load, hidden: str) -> str:
    options = sketch.options
    rows, width = load.tokens, spec.hidden_size
    heads, groups = _shard(spec.heads, options), _shard(spec.kv_groups, options)
    normed = norm(sketch, "norm1", hidden, _sharded(rows, options), width, rms=spec.rms_norm)
    entered = enter_tensor_parallel(sketch, "enter_attention", normed, rows * width)
    linear(
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
    query, key = _split(sketch, query_size, key_size)
    if spec.rotary:
        query = elementwise(sketch, "rotary_query", (query,), query_size)
        key = elementwise(sketch, "rotary_key", (key,), key_size)
    shape = AttentionShape(
        rows=rows,
        heads=heads,
        groups=groups,
        head_size=spec.head_size,
        pairs=pairs(load, options.attention, spec.causal),
    )
    context = attention(sketch, "attention", (query, key, "value"), shape)
    branch = linear(
        sketch,
        "proj",
        context,
        rows=rows,
        width_in=heads * spec.head_size,
        width_out=width,
        bias=spec.bias,
    )
    branch = leave_tensor_parallel(sketch, "leave_attention", branch, rows * width)
    return _residual(sketch, "residual1", branch, hidden)


def _split(sketch: Sketch, query_size: int, key_size: int) -> tuple[str, str]:
    """Views of the projected tensor: query, key and value; no work."""
    views = (
        sketch.tensor("query", query_size),
        sketch.tensor("key", key_size),
        sketch.tensor("value", key_size),
    )
    sketch.operators.append(
        Operator(
            name="split",
            kind=OperatorClass.ELEMENTWISE,
            inputs=("qkv.out",),
            outputs=views,
            forward=NO_WORK,
        )
    )
    return views[0], views[1]


def _mlp_block(sketch: Sketch, spec: LayerSpec, rows: int, hidden: str) -> str:
    options = sketch.options
    width, inner = spec.hidden_size, _shard(spec.ffn_hidden_size, options)
    normed = norm(sketch, "norm2", hidden, _sharded(rows, options), width, rms=spec.rms_norm)
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
    active = activation(sketch, wide, rows * inner, gated=spec.gated_mlp)
    branch = linear(
        sketch, "fc2", active, rows=rows, width_in=inner, width_out=width, bias=spec.bias
    )
    branch = leave_tensor_parallel(sketch, "leave_mlp", branch, rows * width)
    return _residual(sketch, "residual2", branch, hidden)


def activation(sketch: Sketch, source: str, elements: int, *, gated: bool) -> str:
    """GELU, or SwiGLU of the two halves of `source`; keeps its input."""
    saves: tuple[str, ...] = (source,)
    if gated and not sketch.options.fused_activation:
        saves += (sketch.tensor("activation.gate", elements),)
    return elementwise(sketch, "activation", (source,), elements, saves=saves)


def patch_embedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Non-overlapping convolution as one matmul, plus position embeddings; no input gradient."""
    sketch = Sketch("patch_embedding", options)
    patch = module.patch_size or 1
    pixels = module.image_channels * patch * patch
    rows = load.tokens
    source = sketch.tensor("pixels", rows * pixels)
    output = linear(
        sketch,
        "patches",
        source,
        rows=rows,
        width_in=pixels,
        width_out=module.hidden_size,
        bias=True,
        needs_input_grad=False,
    )
    elementwise(sketch, "positions", (output,), rows * module.hidden_size, backward=False)
    return sketch.finish()


def token_embedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Rows looked up in the embedding table; the backward adds them into its gradient."""
    sketch = Sketch("token_embedding", options)
    rows, width = load.tokens, module.hidden_size
    tokens = sketch.tensor("tokens", rows, 8)
    vocabulary = _shard(module.vocab_size or 1, options)
    weight = sketch.tensor("embedding.weight", vocabulary * width, parameter=True)
    output = sketch.tensor("embedding.out", rows * width)
    moved = rows * width * options.element_bytes
    sketch.operators.append(
        Operator(
            name="embedding",
            kind=OperatorClass.EMBEDDING,
            inputs=(tokens, weight),
            outputs=(output,),
            saves=(tokens,),
            forward=Work(memory_bytes=2 * moved),
            weight_grad=Work(memory_bytes=moved + 2 * rows * width * options.gradient_bytes),
        )
    )
    leave_tensor_parallel(sketch, "leave_embedding", output, rows * width)
    return sketch.finish()


def final_norm(module: ModuleSpec, spec: LayerSpec, load: Load, options: RunOptions) -> Subgraph:
    """The norm behind the last layer."""
    sketch = Sketch("final_norm", options)
    rows = _sharded(load.tokens, options)
    hidden = sketch.tensor("hidden", rows * module.hidden_size)
    norm(sketch, "final_norm", hidden, rows, module.hidden_size, rms=spec.rms_norm)
    return sketch.finish()


def projector(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Patches folded into tokens, then two linears (or one) into the consumer's width.

    Folding joins neighbouring patches, so the tokens' width is the hidden size times the patches
    per token.
    """
    sketch = Sketch("projector", options)
    rows = load.output_tokens
    elements = load.tokens * module.hidden_size
    hidden = sketch.tensor("hidden", elements)
    width_in = max(1, elements // max(1, rows))
    width_out = module.output_size or module.hidden_size
    if module.projector_hidden_size is None:
        linear(
            sketch, "project", hidden, rows=rows, width_in=width_in, width_out=width_out, bias=True
        )
        return sketch.finish()
    inner = _shard(module.projector_hidden_size, options)
    wide = linear(
        sketch, "project1", hidden, rows=rows, width_in=width_in, width_out=inner, bias=True
    )
    active = activation(sketch, wide, rows * inner, gated=False)
    branch = linear(
        sketch, "project2", active, rows=rows, width_in=inner, width_out=width_out, bias=True
    )
    leave_tensor_parallel(sketch, "leave_projector", branch, rows * width_out)
    return sketch.finish()


def vocabulary_head(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Logits and vocabulary-parallel cross entropy; the loss keeps its softmax in fp32."""
    sketch = Sketch("vocabulary_head", options)
    rows, width = load.tokens, module.hidden_size
    vocabulary = _shard(module.vocab_size or 1, options)
    hidden = sketch.tensor("hidden", _sharded(rows, options) * width)
    entered = enter_tensor_parallel(sketch, "enter_head", hidden, rows * width)
    logits = linear(
        sketch,
        "logits",
        entered,
        rows=rows,
        width_in=width,
        width_out=vocabulary,
        bias=False,
        keeps=hidden,
    )
    softmax = sketch.tensor("loss.softmax", rows * vocabulary, 4)
    targets = sketch.tensor("loss.targets", rows, 9)
    loss = sketch.tensor("loss.out", rows, 4)
    single = rows * vocabulary * 4
    logit_bytes = sketch.bytes_of(logits)
    sketch.operators.append(
        Operator(
            name="loss",
            kind=OperatorClass.SOFTMAX,
            inputs=(logits,),
            outputs=(softmax, targets, loss),
            saves=(softmax, targets),
            forward=Work(memory_bytes=logit_bytes + 5 * single),
            input_grad=Work(memory_bytes=2 * single + logit_bytes),
        )
    )
    return sketch.finish()
