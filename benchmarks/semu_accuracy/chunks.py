"""Chunks of real megatron-core layers: built, run under a memory strategy, timed, weighed.

ViT and language layers are megatron-core's own. The diffusion layer joins megatron-core's
self-attention, cross-attention and MLP by norms without weights, shifts, scales and gates from a
table, as in Wan2.1; megatron-core has no such layer.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when megatron-core is imported

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec as Spec
from megatron.core.transformer.spec_utils import build_module

from megatron_pipeweaver.ir.lmm import LayerOptions, Modulation, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import PatchSet
from megatron_pipeweaver.semu.architecture import LayerSpec, layer_spec
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.probes import Clock

LAYERS = 2
CONTEXT = 64
"""Tokens of text that cross-attention reads."""
STRATEGIES = (LayerStrategy.KEEP, LayerStrategy.RECOMPUTE, LayerStrategy.ATTENTION)
"""What megatron-core itself can run: everything kept, whole layers again, core attention again."""
Size = tuple[int, int]
"""Sequence and batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCase:
    """A module, the sizes that calibration sees, and those that it is held to."""

    module: ModuleSpec
    seen: tuple[Size, ...]
    held_out: tuple[Size, ...]


def _module(kind: ModuleKind, sizes: str, **more: object) -> ModuleSpec:
    width, ffn, heads, groups = map(int, sizes.split())
    return ModuleSpec(
        name=kind.value,
        kind=kind,
        layers=LAYERS,
        hidden_size=width,
        ffn_hidden_size=ffn,
        attention_heads=heads,
        kv_groups=groups,
        **more,  # type: ignore[arg-type]
    )


def _dit(context: int) -> LayerOptions:
    return LayerOptions(context_size=context, modulation=Modulation.TABLE)


CASES = {
    "cpu": (
        ChunkCase(
            module=_module(ModuleKind.VISION, "192 768 6 6", layer=LayerOptions(rotary=False)),
            seen=((49, 2), (64, 4), (121, 1), (196, 2), (256, 1)),
            held_out=((49, 3), (100, 2), (144, 1), (196, 1), (225, 1), (289, 1)),
        ),
        ChunkCase(
            module=_module(ModuleKind.LANGUAGE, "256 768 8 4", gated_mlp=True),
            seen=((64, 1), (96, 2), (128, 1), (256, 1), (320, 1)),
            held_out=((80, 1), (96, 1), (160, 1), (192, 1), (224, 1), (288, 1)),
        ),
        ChunkCase(
            module=_module(ModuleKind.DIFFUSION, "192 768 6 6", layer=_dit(256)),
            seen=((64, 2), (100, 1), (196, 1), (256, 1)),
            held_out=((81, 1), (144, 1), (144, 2), (225, 1)),
        ),
    ),
    "cuda": (
        ChunkCase(
            module=_module(ModuleKind.VISION, "1280 5120 16 16", layer=LayerOptions(rotary=False)),
            seen=((576, 4), (1024, 4), (1024, 8), (2704, 2)),
            held_out=((576, 12), (1024, 2), (1600, 4), (2704, 1)),
        ),
        ChunkCase(
            module=_module(ModuleKind.LANGUAGE, "4096 14336 32 8", gated_mlp=True),
            seen=((1024, 1), (2048, 1), (2048, 2), (4096, 1)),
            held_out=((1536, 1), (3072, 1), (1024, 2), (1536, 2)),
        ),
        ChunkCase(
            module=_module(ModuleKind.DIFFUSION, "3072 8192 24 24", layer=_dit(4096)),
            seen=((1024, 1), (2048, 1), (2048, 2), (4096, 1)),
            held_out=((1536, 1), (3072, 1), (1024, 2), (1536, 2)),
        ),
    ),
}
MIDDLE = StageShape(layers=LAYERS, is_first=False, is_last=False)


def load_of(case: ChunkCase, size: Size) -> Load:
    """What a chunk of `case` works on at `size`."""
    sequence, batch = size
    crosses = case.module.layer.context_size is not None
    return Load(
        sequence=sequence,
        batch=batch,
        lengths=(sequence,) * batch,
        context_lengths=(CONTEXT,) * batch if crosses else (),
    )


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """megatron-core's parallel state with this process alone."""
    with PatchSet(cpu_patches() if device == "cpu" else ()):
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel(1, 1)
            model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _config(spec: LayerSpec, device: str, strategy: LayerStrategy) -> TransformerConfig:
    more: dict[str, object] = {}
    if spec.gated_mlp:
        more |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if strategy is LayerStrategy.ATTENTION:
        more |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if device == "cuda":
        more |= {"bf16": True, "params_dtype": torch.bfloat16}
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_groups,
        kv_channels=spec.head_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=spec.bias,
        add_qkv_bias=spec.qkv_bias,
        normalization="RMSNorm" if spec.rms_norm else "LayerNorm",
        attention_softmax_in_fp32=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=device == "cpu",
        **more,
    )


class DiffusionLayer(torch.nn.Module):
    """Self-attention, cross-attention and MLP; shifts, scales and gates from a learned table."""

    def __init__(self, config: TransformerConfig, context_size: int) -> None:
        super().__init__()
        parts = get_vit_layer_with_local_spec().submodules
        device = "cpu" if config.use_cpu_initialization else "cuda"
        kind = {"device": device, "dtype": config.params_dtype}
        self.table = torch.nn.Parameter(torch.randn(6, config.hidden_size, **kind) / 10)
        self.norm_cross = torch.nn.LayerNorm(config.hidden_size, **kind)
        self.attention = build_module(parts.self_attention, config=config, layer_number=1)
        self.cross = build_module(
            Spec(
                module=CrossAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=CrossAttentionSubmodules(
                    linear_q=ColumnParallelLinear,
                    linear_kv=ColumnParallelLinear,
                    core_attention=DotProductAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            config=config,
            layer_number=1,
        )
        # megatron-core takes keys and values of the queries' width; here they have their own.
        self.cross.linear_kv = build_module(
            ColumnParallelLinear,
            context_size,
            2 * config.kv_channels * config.num_query_groups,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear,
            skip_bias_add=False,
            is_expert=False,
        )
        self.mlp = MLP(
            config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        )
        self.width = config.hidden_size

    def _normed(self, hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor):
        normed = torch.nn.functional.layer_norm(hidden, (self.width,))
        return torch.addcmul(shift, normed, 1 + scale)

    def forward(self, hidden, attention_mask=None, context=None, **_):
        """The layer; like megatron-core's, a pair whose second half is not used."""
        one, two, three, four, five, six = self.table.unbind(0)
        branch, bias = self.attention(self._normed(hidden, one, two), attention_mask=None)
        hidden = hidden + three * (branch if bias is None else branch + bias)
        branch, bias = self.cross(
            self.norm_cross(hidden), attention_mask=None, key_value_states=context
        )
        hidden = hidden + (branch if bias is None else branch + bias)
        branch, bias = self.mlp(self._normed(hidden, four, five))
        return hidden + six * (branch if bias is None else branch + bias), None


def build_layers(module: ModuleSpec, device: str, strategy: LayerStrategy) -> list[torch.nn.Module]:
    """`LAYERS` real layers of `module` on `device`."""
    spec = layer_spec(module)
    config = _config(spec, device, strategy)
    if spec.modulation is not None:
        assert spec.context_size is not None
        return [DiffusionLayer(config, spec.context_size).train() for _ in range(LAYERS)]
    norm = "RMSNorm" if spec.rms_norm else None
    made = (
        get_gpt_layer_local_spec(normalization=norm)
        if spec.causal
        else get_vit_layer_with_local_spec()
    )
    layers = [
        build_module(made, config=config, layer_number=number + 1).train()
        for number in range(LAYERS)
    ]
    return [layer.to(device) for layer in layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Bytes of one forward and backward: kept in between, and the most that was allocated.

    `peak_bytes` is `None` where there is no allocator to ask.
    """

    held_bytes: int
    peak_bytes: int | None


class Chunk:
    """Real layers of one case under one strategy, at any size."""

    def __init__(self, case: ChunkCase, device: str, strategy: LayerStrategy) -> None:
        self.case, self.strategy = case, strategy
        self._device = device
        self._dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._spec = layer_spec(case.module)
        self._layers = build_layers(case.module, device, strategy)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of all layers."""
        for layer in self._layers:
            yield from layer.parameters()

    def made(
        self, size: Size
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], tuple[torch.Tensor, ...]]:
        """The chunk's input at `size`, its forward, and what that reads of other modules."""
        sequence, batch = size
        spec = self._spec
        hidden = self._random(sequence, batch, spec.hidden_size).requires_grad_(True)
        mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device=self._device).triu(1)
        angles = torch.randn(sequence, 1, 1, spec.head_size, device=self._device)
        context = self._random(CONTEXT, batch, spec.context_size or 1)
        more: dict[str, torch.Tensor] = {}
        if spec.rotary:
            more["rotary_pos_emb"] = angles
        if spec.context_size is not None:
            more["context"] = context

        def forward(states: torch.Tensor) -> torch.Tensor:
            for layer in self._layers:
                run = lambda one, layer=layer: layer(one, attention_mask=mask, **more)[0]  # noqa: E731
                again = self.strategy is LayerStrategy.RECOMPUTE
                states = tensor_parallel.checkpoint(run, False, states) if again else run(states)
            return states

        return hidden, forward, (context,)

    def time_ns(self, size: Size, clock: Clock) -> tuple[int, int]:
        """Forward and backward, once."""
        hidden, forward, _ = self.made(size)
        gradient = torch.randn_like(hidden)
        start = clock.now_ns()
        output = forward(hidden)
        middle = clock.now_ns()
        output.backward(gradient)
        return middle - start, clock.now_ns() - middle

    def weigh(self, size: Size) -> Weight:
        """What is kept from the forward to the backward, and the peak of both."""
        if self._device == "cpu":
            return Weight(held_bytes=self._saved_bytes(size), peak_bytes=None)
        hidden, forward, _ = self.made(size)
        gradient = torch.randn_like(hidden)
        forward(hidden).backward(gradient)  # so that weights have their gradients
        hidden.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = forward(hidden)
        held = torch.cuda.memory_allocated() - before
        output.backward(gradient)
        peak = torch.cuda.max_memory_allocated() - before
        # The chunk's input, which its first layer keeps, was there before.
        own = hidden.nbytes
        return Weight(held_bytes=held - output.nbytes + own, peak_bytes=peak + own)

    def _saved_bytes(self, size: Size) -> int:
        """Storages that autograd keeps, parameters and what other modules hold apart."""
        hidden, forward, given = self.made(size)
        ignored = {one.untyped_storage().data_ptr() for one in (*self.parameters(), *given)}
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            floats = tensor.dtype is self._dtype
            if storage.data_ptr() not in ignored and floats:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(hidden)
        return sum(size for size, _ in kept.values())


def cases(device: str, *, small: bool) -> tuple[ChunkCase, ...]:
    """The cases of a device; small ones have two sizes each, to try the script out."""
    if not small:
        return CASES[device]
    return tuple(
        replace(one, seen=one.seen[:2], held_out=one.held_out[:1]) for one in CASES[device]
    )
