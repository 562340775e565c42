"""Predicted against measured stage pairs of real megatron-core layers on this CPU.

    OMP_NUM_THREADS=1 python benchmarks/semu_accuracy/run.py [--repeats 9] [-o result.md]

Calibrates from single operators, then compares chunks of two layers at sizes that calibration
never saw: forward and backward, medians of repeated runs. Times are processor times of one thread,
so that other programs on the machine count as little as can be; a quiet machine is still better.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module

from megatron_pipeweaver.ir.lmm import LayerOptions, ModuleKind, ModuleSpec
from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import PatchSet
from megatron_pipeweaver.semu.calibration import (
    LayerSample,
    calibrate,
    measure,
    with_layer_times,
)
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions

LAYERS = 2
WIDTH, HEADS, FFN = 192, 6, 768
HELD_OUT = {"vision": [(49, 3), (100, 2), (196, 1)], "language": [(96, 1), (160, 1), (320, 1)]}
LAYER_CALIBRATION = [(64, 2), (128, 1), (256, 1)]
CALIBRATION = [
    (32, 128),
    (64, 192),
    (96, 256),
    (128, 128),
    (192, 192),
    (256, 256),
    (384, 128),
    (384, 256),
]


def module(name: str) -> ModuleSpec:
    kind = ModuleKind.VISION if name == "vision" else ModuleKind.LANGUAGE
    return ModuleSpec(
        name=name,
        kind=kind,
        layers=LAYERS,
        hidden_size=WIDTH,
        ffn_hidden_size=FFN,
        attention_heads=HEADS,
        kv_groups=HEADS,
        layer=LayerOptions(rotary=False),
    )


def real_layers(name: str) -> list[torch.nn.Module]:
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    make = get_vit_layer_with_local_spec if name == "vision" else get_gpt_layer_local_spec
    return [
        build_module(make(), config=config, layer_number=number + 1).train()
        for number in range(LAYERS)
    ]


def time_chunk(
    layers: list[torch.nn.Module], size: tuple[int, int], repeats: int
) -> tuple[int, int]:
    """Median forward and backward of a chunk."""
    sequence, batch = size
    mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1)
    forwards, backwards = [], []
    for _ in range(repeats + 2):
        hidden = torch.randn(sequence, batch, WIDTH).requires_grad_(True)
        gradient = torch.randn(sequence, batch, WIDTH)
        start = time.process_time_ns()
        output = hidden
        for layer in layers:
            output = layer(output, attention_mask=mask)[0]
        middle = time.process_time_ns()
        output.backward(gradient)
        forwards.append(middle - start)
        backwards.append(time.process_time_ns() - middle)
    return round(statistics.median(forwards[2:])), round(statistics.median(backwards[2:]))


def predict(costs: AnalyticCostModel, name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Emulated forward and backward of the same chunk."""
    sequence, batch = size
    load = Load(sequence=sequence, batch=batch, lengths=(sequence,) * batch)
    stage = StageShape(layers=LAYERS, is_first=False, is_last=False)
    keep = costs.stage_strategies(module(name), stage, load)[0]
    return keep.forward_ns, keep.backward_ns + keep.weight_grad_ns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = measure(sizes=CALIBRATION, repeats=arguments.repeats)
    plain = replace(load_device("cpu"), layer_forward_ns=0, layer_backward_ns=0)
    fitted = calibrate(samples, plain)
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}, {arguments.repeats} repeats",
        "",
        "| operator class | held-out error |",
        "|---|---|",
        *(f"| {kind} | {error:.1%} |" for kind, error in fitted.held_out_error.items()),
        "",
        "| chunk | sequence x batch | measured ms | predicted ms | error |",
        "|---|---|---|---|---|",
    ]
    errors = []
    with PatchSet(cpu_patches()):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
        model_parallel_cuda_manual_seed(1)
        chunks = {name: real_layers(name) for name in HELD_OUT}
        bare = AnalyticCostModel(fitted.profile, RunOptions.unfused())
        seen = [
            LayerSample(
                layers=LAYERS,
                emulated_forward_ns=predict(bare, name, size)[0],
                emulated_backward_ns=predict(bare, name, size)[1],
                forward_ns=forward,
                backward_ns=backward,
            )
            for name, layers in chunks.items()
            for size in LAYER_CALIBRATION
            for forward, backward in [time_chunk(layers, size, arguments.repeats)]
        ]
        costs = AnalyticCostModel(with_layer_times(fitted.profile, seen), RunOptions.unfused())
        for name, sizes in HELD_OUT.items():
            for size in sizes:
                predicted = sum(predict(costs, name, size))
                measured = sum(time_chunk(chunks[name], size, arguments.repeats))
                errors.append(abs(predicted - measured) / measured)
                lines.append(
                    f"| {name} | {size[0]} x {size[1]} | {measured / 1e6:.2f} "
                    f"| {predicted / 1e6:.2f} | {predicted / measured - 1:+.1%} |"
                )
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    lines += ["", f"mean accuracy {1 - statistics.mean(errors):.1%}"]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
