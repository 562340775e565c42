"""What stands in front of and behind the layers: embeddings, projectors, heads."""

from __future__ import annotations

from megatron_pipeweaver.ir.lmm import MODULATIONS, Modulation, ModuleKind, ModuleSpec
from megatron_pipeweaver.semu.architecture import LayerSpec
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.operators import (
    INDEX_BYTES,
    Sketch,
    activation,
    collective_work,
    context_rows,
    elementwise,
    embedding,
    enter_tensor_parallel,
    leave_tensor_parallel,
    linear,
    norm,
    shard,
    sharded_rows,
)
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Queue, Subgraph, Work

SINGLE_BYTES = 4
"""The loss is computed in single precision."""
TIME_WAVES = 256
"""Sines and cosines that a diffusion model tells a time by (DiT)."""


def patch_embedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """Non-overlapping convolution as one matmul, plus position embeddings; no input gradient.

    Clips are noised first; their positions are sinusoids, and they travel in one row with what
    they are conditioned on.
    """
    sketch = Sketch("patch_embedding", options)
    patch = module.patch_size or 1
    pixels = module.image_channels * patch * patch
    rows = context_rows(load, options)
    clips = module.kind is ModuleKind.DIFFUSION
    source = sketch.tensor("pixels", rows * pixels)
    if clips:
        _worked_on(sketch, "noise", source, _NOISE)
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
    size = rows * module.hidden_size
    if clips:
        _worked_on(sketch, "sinusoids", sketch.tensor("waves", size, SINGLE_BYTES), _SINUSOIDS)
    output = elementwise(sketch, "add_positions", (output,), size, backward=False)
    if clips:
        elementwise(sketch, "join_rows", (output,), size, apart=_JOINED)
    return sketch.finish()


_NOISE = (7, 3)
_SINUSOIDS = (7, 18)
"""Passes and kernels of noising clips and cutting them up; of telling where a patch stands."""
_JOINED = ((2, 1), (7, 5))
"""Those of joining rows, and of taking their gradients apart."""


def _worked_on(sketch: Sketch, name: str, tensor: str, work: tuple[int, int]) -> None:
    """Passes over a tensor that no gradient goes through."""
    passes, kernels = work
    sketch.operators.append(
        Operator(
            name=name,
            kind=OperatorClass.ELEMENTWISE,
            inputs=(),
            outputs=(tensor,),
            forward=Work(memory_bytes=passes * sketch.bytes_of(tensor), kernels=kernels),
        )
    )


def patch_unembedding(module: ModuleSpec, load: Load, options: RunOptions) -> Subgraph:
    """One linear from hidden states to the patches that a diffusion model predicts, and the loss.

    The mean square of the difference is taken in single precision.
    """
    sketch = Sketch("patch_unembedding", options)
    patch = module.patch_size or 1
    rows = context_rows(load, options)
    values = module.image_channels * patch * patch
    hidden = sketch.tensor("hidden", rows * module.hidden_size)
    made = linear(
        sketch,
        "unpatch",
        hidden,
        rows=rows,
        width_in=module.hidden_size,
        width_out=values,
        bias=True,
    )
    loss = sketch.tensor("loss.out", rows, SINGLE_BYTES)
    difference = sketch.tensor("loss.difference", rows * values, SINGLE_BYTES)
    made_bytes, single_bytes = sketch.bytes_of(made), sketch.bytes_of(difference)
    copied = 0 if options.element_bytes == SINGLE_BYTES else made_bytes + single_bytes
    sketch.operators.append(
        Operator(
            name="loss",
            kind=OperatorClass.ELEMENTWISE,
            inputs=(made,),
            outputs=(loss, difference),
            saves=(difference,),
            # Noise less clip, cut up; its difference from what was predicted, squared, its mean.
            forward=Work(memory_bytes=7 * made_bytes + 2 * copied + 6 * single_bytes, kernels=6),
            input_grad=Work(memory_bytes=copied + 8 * single_bytes, kernels=4),
        )
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
    output = embedding(sketch, tokens, weight, rows=rows, width=width)
    if module.after:
        output = _images_placed(sketch, output, rows * width)
    output = leave_tensor_parallel(sketch, "leave_embedding", output, rows * width)
    if options.dropout:
        elements = sketch.elements(output)
        mask = sketch.tensor("embedding.dropout_mask", elements, options.mask_bytes)
        elementwise(sketch, "embedding_dropout", (output,), elements, makes=(mask,))
    return sketch.finish()


def _images_placed(sketch: Sketch, embedded: str, elements: int) -> str:
    """Embeddings with those of images in their places: a copy, which images are written into."""
    return elementwise(
        sketch, "place_images", (embedded,), elements, apart=((3, 9), (3, 3)), saves=()
    )


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
    # Logits of less precision are copied into single precision; others are worked on in place.
    single = options.element_bytes == SINGLE_BYTES
    softmax = sketch.tensor(
        "loss.softmax", rows * vocabulary, SINGLE_BYTES, base=logits if single else None
    )
    totals = _loss_exchanged(sketch, logits, rows)
    # Which targets are not on this rank (one byte each), and where they are.
    targets = sketch.tensor("loss.targets", rows, INDEX_BYTES + 1)
    loss = sketch.tensor("loss.out", rows, SINGLE_BYTES)
    softmax_bytes = sketch.bytes_of(softmax)
    copied = 0 if single else sketch.bytes_of(logits, softmax)
    sketch.operators.append(
        Operator(
            name="loss",
            kind=OperatorClass.SOFTMAX,
            inputs=(logits, *totals),
            outputs=(loss, softmax, targets),
            saves=(softmax, targets),
            # Largest, difference, exponential, sum, quotient; targets are looked up row by row.
            forward=Work(memory_bytes=copied + 8 * softmax_bytes, kernels=20),
            input_grad=Work(memory_bytes=copied + 2 * softmax_bytes, kernels=8),
            overwrites=softmax if single else None,
        )
    )
    return sketch.finish()


def _loss_exchanged(sketch: Sketch, logits: str, rows: int) -> tuple[str, ...]:
    """Each row's largest logit, sum and target logit, from all tensor-parallel ranks."""
    ranks = sketch.options.parallel.tensor
    if ranks == 1:
        return ()
    one = collective_work(OperatorClass.ALL_REDUCE, rows * SINGLE_BYTES, ranks)
    totals = sketch.tensor("loss.totals", 3 * rows, SINGLE_BYTES)
    sketch.operators.append(
        Operator(
            name="loss_totals",
            kind=OperatorClass.ALL_REDUCE,
            inputs=(logits,),
            outputs=(totals,),
            forward=Work(
                network_bytes=3 * one.network_bytes,
                memory_bytes=3 * one.memory_bytes,
                steps=3 * one.steps,
                kernels=3,
            ),
            queue=Queue.TENSOR_LINK,
        )
    )
    return (totals,)
