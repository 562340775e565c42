"""Chunks of real layers alone, and the sizes at which they are run.

They are the layers that are trained (`models.strategy`): megatron-core's own for ViT and language
model, megatron-core's attention and MLP between modulated norms for the diffusion model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when megatron-core is imported

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module

from benchmarks.semu_accuracy.work import Chunk, Pass, Size
from megatron_pipeweaver.ir.lmm import LayerOptions, Modulation, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.models.diffusion_layer import diffusion_layer_spec
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.packing import packed_sequences
from megatron_pipeweaver.models.specs import vision_layer_spec
from megatron_pipeweaver.models.strategy import StrategyLayer
from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import PatchSet
from megatron_pipeweaver.runtime.offload import HostOffload
from megatron_pipeweaver.semu.architecture import LayerSpec, layer_spec
from megatron_pipeweaver.semu.interface import Load, StageShape

LAYERS = 2
CONTEXT = 64
"""Tokens of text that cross-attention reads."""
_HERE = (
    LayerStrategy.KEEP,
    LayerStrategy.RECOMPUTE,
    LayerStrategy.ATTENTION,
    LayerStrategy.MLP,
    LayerStrategy.NORM,
    LayerStrategy.ACTIVATION,
    LayerStrategy.LIGHT,
)
STRATEGIES = {"cpu": _HERE, "cuda": (*_HERE, LayerStrategy.OFFLOAD)}
"""On a CPU, host and device are one memory, and one thread does not copy beside its work."""


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


def _lengths(*lengths: int) -> tuple[Size, ...]:
    """Clips of these lengths, one at a time: their layers have one row."""
    return tuple((length, 1) for length in lengths)


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
            module=_module(ModuleKind.DIFFUSION, "192 768 6 6", layer=_dit(192)),
            seen=_lengths(64, 100, 196, 256),
            held_out=_lengths(81, 144, 169, 225),
        ),
    ),
    # Large enough that a GPU works longer than the host needs to tell it what to do.
    "cuda": (
        ChunkCase(
            module=_module(ModuleKind.VISION, "1792 15360 16 16", layer=LayerOptions(rotary=False)),
            seen=((576, 8), (1024, 8), (1024, 12), (2704, 2), (2704, 4)),
            held_out=((576, 12), (1024, 6), (1600, 4), (2704, 3)),
        ),
        ChunkCase(
            module=_module(ModuleKind.LANGUAGE, "4096 14336 32 8", gated_mlp=True),
            seen=((2048, 1), (2048, 2), (4096, 1), (1024, 4)),
            held_out=((2560, 1), (3072, 1), (1024, 3), (1536, 2)),
        ),
        ChunkCase(
            module=_module(ModuleKind.DIFFUSION, "3072 8192 24 24", layer=_dit(3072)),
            seen=_lengths(2048, 3072, 4096, 6144),
            held_out=_lengths(2560, 3584, 4608, 5120),
        ),
    ),
}


def load_of(module: ModuleSpec, size: Size) -> Load:
    """What layers of `module` work on at `size`."""
    sequence, batch = size
    crosses = module.layer.context_size is not None
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


def _config(spec: LayerSpec, device: str) -> TransformerConfig:
    more: dict[str, object] = {}
    if spec.gated_mlp:
        more |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
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


def build_layers(module: ModuleSpec, device: str) -> list[StrategyLayer]:
    """`LAYERS` real layers of `module` on `device`, megatron-core's own and not fused."""
    spec = layer_spec(module)
    config, options = _config(spec, device), ModelOptions(transformer_engine=False)
    if spec.modulation is not None:
        made = diffusion_layer_spec(module, options)
    elif spec.causal:
        norm = "RMSNorm" if spec.rms_norm else None
        made = replace(get_gpt_layer_local_spec(normalization=norm), module=StrategyLayer)
    else:
        made = vision_layer_spec(options)
    numbers = range(1, LAYERS + 1)
    layers = [build_module(made, config=config, layer_number=number) for number in numbers]
    dtype = config.params_dtype
    return [layer.train().to(device=device, dtype=dtype) for layer in layers]


class LayersChunk(Chunk):
    """Layers of the middle of a module, which calibration is given as well."""

    stage = StageShape(layers=LAYERS, is_first=False, is_last=False)

    def __init__(self, case: ChunkCase, device: str) -> None:
        super().__init__(device)
        self.module = case.module
        self.name = f"{case.module.name} layers"
        self._spec = layer_spec(case.module)
        self._layers = build_layers(case.module, device)

    def load(self, size: Size) -> Load:
        """What SEMU is told of the work at `size`."""
        return load_of(self.module, size)

    def parameters(self, size: Size) -> Iterator[torch.nn.Parameter]:
        """Those of all layers."""
        for layer in self._layers:
            yield from layer.parameters()

    def made(self, size: Size, strategy: LayerStrategy, offload: HostOffload | None = None) -> Pass:
        """A forward at `size`: hidden states in, hidden states out."""
        sequence, batch = size
        spec, device = self._spec, torch.device(self.device)
        hidden = self.random(sequence, batch, spec.hidden_size).requires_grad_(True)
        more: dict[str, object] = {"attention_mask": None}
        given: list[torch.Tensor] = []
        if spec.causal:
            mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device=device).triu(1)
            more["attention_mask"] = mask
            given.append(mask)
        if spec.rotary:
            more["rotary_pos_emb"] = torch.randn(sequence, 1, 1, spec.head_size, device=device)
        if spec.modulation is not None:
            rows = spec.modulation.time_tokens + CONTEXT
            given.append(self.random(rows, 1, spec.context_size or 1))
            more["context"] = given[-1]
            more["packed_seq_params"] = packed_sequences([sequence], device, [CONTEXT])

        def run() -> torch.Tensor:
            states = hidden
            for layer in self._layers:
                layer.strategy, layer.saver = strategy, offload
                states, _ = layer(states, **more)
            return states

        return Pass(run=run, owned=(hidden,), given=tuple(given))


def cases(device: str, *, small: bool) -> tuple[ChunkCase, ...]:
    """The cases of a device; small ones have two sizes each, to try the script out."""
    if not small:
        return CASES[device]
    return tuple(
        replace(one, seen=one.seen[:2], held_out=one.held_out[:1]) for one in CASES[device]
    )
