"""What stands in front of and behind the layers: embeddings, projectors, heads."""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import MODULATIONS, Modulation, ModuleSpec
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.operators import (
    INDEX_BYTES,
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
)
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Subgraph, Work

SINGLE_BYTES = 4
"""The loss is computed in single precision."""
TIME_WAVES = 256
"""Sines and cosines that a diffusion model tells a time by (DiT)."""


def patch_embedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Non-overlapping convolution as one matmul, plus position embeddings; no input gradient."""
    sketch = Sketch("patch_embedding", options)
    patch = module.patch_size or 1
    pixels = module.image_channels * patch * patch
    rows = context_rows(load, options)
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
    if module.layer.positions:
        sketch.tensor("positions", module.layer.positions * module.hidden_size, parameter=True)
    elementwise(sketch, "add_positions", (output,), rows * module.hidden_size, backward=False)
    return sketch.finish()


def patch_unembedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """One linear from hidden states back to the patches that a diffusion model predicts."""
    sketch = Sketch("patch_unembedding", options)
    patch = module.patch_size or 1
    rows = context_rows(load, options)
    hidden = sketch.tensor("hidden", rows * module.hidden_size)
    linear(
        sketch,
        "unpatch",
        hidden,
        rows=rows,
        width_in=module.hidden_size,
        width_out=module.image_channels * patch * patch,
        bias=True,
    )
    return sketch.finish()


def token_embedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Rows looked up in the embedding table; the backward adds them into its gradient."""
    sketch = Sketch("token_embedding", options)
    rows, width = context_rows(load, options), module.hidden_size
    tokens = sketch.tensor("tokens", rows, INDEX_BYTES)
    vocabulary = shard(module.vocab_size or 1, options)
    weight = sketch.tensor("embedding.weight", vocabulary * width, parameter=True)
    if module.layer.positions:
        sketch.tensor("positions", module.layer.positions * width, parameter=True)
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
    output = leave_tensor_parallel(sketch, "leave_embedding", output, rows * width)
    if options.dropout:
        elements = sketch.elements(output)
        mask = sketch.tensor("embedding.dropout_mask", elements, options.mask_bytes)
        elementwise(sketch, "embedding_dropout", (output,), elements, makes=(mask,))
    return sketch.finish()


def condition_embedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """What a diffusion model's layers are conditioned on: times, and the prompts' features.

    Two linears embed the time of each clip, a third makes the modulation that layers with a table
    share; two more bring features of another width to that of the layers.
    """
    sketch = Sketch("condition_embedding", options)
    rows, width = len(load.lengths), module.hidden_size
    waves = sketch.tensor("waves", rows * TIME_WAVES)
    time = _two_linears(sketch, "time", waves, rows, (TIME_WAVES, width), needs_input_grad=False)
    if module.layer.modulation is Modulation.TABLE:
        active = activation(sketch, "time_active", time, rows * width, gated=False)
        linear(
            sketch,
            "time_shared",
            active,
            rows=rows,
            width_in=width,
            width_out=MODULATIONS * width,
            bias=True,
        )
    if module.input_size is not None:
        rows = sum(load.context_lengths)
        features = sketch.tensor("features", rows * module.input_size)
        _two_linears(sketch, "text", features, rows, (module.input_size, width))
    return sketch.finish()


def _two_linears(
    sketch: Sketch,
    name: str,
    source: str,
    rows: int,
    widths: tuple[int, int],
    *,
    needs_input_grad: bool = True,
) -> str:
    width_in, width = widths
    inner = linear(
        sketch,
        f"{name}_in",
        source,
        rows=rows,
        width_in=width_in,
        width_out=width,
        bias=True,
        needs_input_grad=needs_input_grad,
    )
    active = activation(sketch, f"{name}_activation", inner, rows * width, gated=False)
    return linear(
        sketch, f"{name}_out", active, rows=rows, width_in=width, width_out=width, bias=True
    )


def final_norm(module: ModuleSpec, spec: LayerSpec, load: Load, options: RunOptions) -> Subgraph:
    """The norm behind the last layer, modulated by shift and scale where the layers are."""
    sketch = Sketch("final_norm", options)
    width = module.hidden_size
    rows = sharded_rows(context_rows(load, options), options)
    hidden = sketch.tensor("hidden", rows * width)
    affine = spec.modulation is None
    normed = norm(sketch, "final_norm", hidden, rows, width, rms=spec.rms_norm, affine=affine)
    if spec.modulation is Modulation.TABLE:
        sketch.tensor("final_table", 2 * width, parameter=True)
    if spec.modulation is Modulation.LINEAR:
        clips = len(load.lengths)
        time = sketch.tensor("final_time", clips * width)
        linear(
            sketch,
            "final_modulation",
            time,
            rows=clips,
            width_in=width,
            width_out=2 * width,
            bias=True,
        )
    if spec.modulation is not None:
        elementwise(sketch, "modulate_final", (normed,), rows * width, saves=(normed,))
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
    inner = shard(module.projector_hidden_size, options)
    wide = linear(
        sketch, "project1", hidden, rows=rows, width_in=width_in, width_out=inner, bias=True
    )
    active = activation(sketch, "activation", wide, rows * inner, gated=False)
    branch = linear(
        sketch, "project2", active, rows=rows, width_in=inner, width_out=width_out, bias=True
    )
    leave_tensor_parallel(sketch, "leave_projector", branch, rows * width_out)
    return sketch.finish()


def vocabulary_head(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Logits and vocabulary-parallel cross entropy; the loss keeps its softmax in fp32."""
    return _vocabulary_head(module, load, options, shares_embedding=False)


def tied_vocabulary_head(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """The same, with the weight of the token embedding of the same stage."""
    return _vocabulary_head(module, load, options, shares_embedding=True)


def _vocabulary_head(
    module: ModuleSpec, load: Load, options: RunOptions, *, shares_embedding: bool
) -> Subgraph:
    sketch = Sketch("vocabulary_head", options)
    rows, width = context_rows(load, options), module.hidden_size
    vocabulary = shard(module.vocab_size or 1, options)
    hidden = sketch.tensor("hidden", sharded_rows(rows, options) * width)
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
        owns_weight=not shares_embedding,
    )
    softmax = sketch.tensor("loss.softmax", rows * vocabulary, SINGLE_BYTES)
    # Which targets are not on this rank (one byte each), and where they are.
    targets = sketch.tensor("loss.targets", rows, INDEX_BYTES + 1)
    loss = sketch.tensor("loss.out", rows, SINGLE_BYTES)
    logit_bytes, softmax_bytes = sketch.bytes_of(logits), sketch.bytes_of(softmax)
    sketch.operators.append(
        Operator(
            name="loss",
            kind=OperatorClass.SOFTMAX,
            inputs=(logits,),
            outputs=(softmax, targets, loss),
            saves=(softmax, targets),
            forward=Work(memory_bytes=logit_bytes + 5 * softmax_bytes),
            input_grad=Work(memory_bytes=2 * softmax_bytes + logit_bytes),
        )
    )
    return sketch.finish()
