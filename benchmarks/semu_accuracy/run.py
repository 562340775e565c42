"""Predicted against measured chunks of real megatron-core layers, on this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.semu_accuracy.run --device cpu -o FILE
    python -m benchmarks.semu_accuracy.run --device cuda --base H100 -o FILE

Calibrates from single operators and from chunks at some sizes, then compares chunks (forward plus
backward; ViT, language model, diffusion model; each strategy) at sizes that calibration never saw.
All are measured in turn, round by round, so that a machine that drifts does so for calibration and
comparison alike; medians over rounds count. On a CPU times are processor times of one thread, and
the C library is told to keep freed memory, as torch's allocator does on a GPU.
"""

import argparse
import os
import platform
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.semu_accuracy.chunks import (
    LAYERS,
    MIDDLE,
    STRATEGIES,
    Chunk,
    ChunkCase,
    Size,
    cases,
    load_of,
    one_rank,
)
from megatron_pipeweaver.errors import PipeWeaverError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.calibration import LayerSample, calibrate, with_layer_times
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.probes import ProbeRounds

KEEP_FREED_MEMORY = {
    # glibc would hand freed activations back to the system, and fault them in again.
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}
OPERATOR_SIZES = {
    "cpu": [(rows, width) for width in (128, 192, 256) for rows in (32, 64, 96, 128, 192, 256)],
    "cuda": [(rows, width) for width in (1280, 3072, 4096) for rows in (1024, 2048, 3072, 4096)],
}
MIB = 1 << 20


@dataclass(slots=True)
class Timed:
    """One chunk at one size under one strategy: its times over the rounds."""

    chunk: Chunk
    size: Size
    strategy: LayerStrategy = LayerStrategy.KEEP
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)

    @property
    def case(self) -> ChunkCase:
        """What the chunk is made of."""
        return self.chunk.case

    def both_ns(self) -> float:
        """Median of forward plus backward."""
        return statistics.median(map(sum, zip(self.forward, self.backward, strict=True)))


def options_of(device: str) -> RunOptions:
    """How the local layers of megatron-core run: nothing fused, but for what torch fuses itself."""
    if device == "cpu":
        return RunOptions.unfused()
    row = torch.ones(8, device=device, dtype=torch.bfloat16, requires_grad=True)
    normed = torch.nn.functional.rms_norm(row, (8,), torch.ones_like(row))
    fused = "Fused" in type(normed.grad_fn).__name__
    return replace(RunOptions.unfused(element_bytes=2), mask_bytes=1, fused_norm=fused)


def predicted_ns(
    costs: AnalyticCostModel, case: ChunkCase, size: Size, strategy: LayerStrategy
) -> tuple[int, int]:
    """Emulated forward and backward of a chunk."""
    layers = costs.layer_strategies(case.module, MIDDLE, load_of(case, size), (strategy,))
    one = layers.uniform(strategy)
    return one.forward_ns, one.backward_ns + one.weight_grad_ns


def predicted_bytes(
    costs: AnalyticCostModel, case: ChunkCase, size: Size, strategy: LayerStrategy
) -> tuple[int, int]:
    """Emulated bytes that a chunk keeps, and those with the most that it works with."""
    layers = costs.layer_strategies(case.module, MIDDLE, load_of(case, size), (strategy,)).layers
    held = sum(layer[strategy].held_bytes for layer in layers)
    return held, held + max(layer[strategy].working_bytes for layer in layers)


def timed_rounds(rounds: int, probes: ProbeRounds, chunks: Sequence[Timed]) -> None:
    """Every probe and every chunk once a round, in another order each time; the first warms up.

    Calibration and comparison thus meet the same moods of the machine.
    """
    source = random.Random(0)
    steps: list[tuple[Timed | None, int]] = [
        *((None, index) for index in range(len(probes))),
        *((one, 0) for one in chunks),
    ]
    for number in range(rounds + 1):
        source.shuffle(steps)
        for one, index in steps:
            if one is None:
                probes.run_one(index)
                continue
            forward, backward = one.chunk.time_ns(one.size, one.strategy, probes.clock)
            if number:
                one.forward.append(forward)
                one.backward.append(backward)


def layer_samples(costs: AnalyticCostModel, seen: Sequence[Timed]) -> list[LayerSample]:
    """What calibration of layers is given: kept chunks at the sizes that it may see."""
    return [
        LayerSample(
            layers=LAYERS,
            emulated_forward_ns=forward,
            emulated_backward_ns=backward,
            forward_ns=round(statistics.median(one.forward)),
            backward_ns=round(statistics.median(one.backward)),
        )
        for one in seen
        for forward, backward in [predicted_ns(costs, one.case, one.size, LayerStrategy.KEEP)]
    ]


def table(header: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    names = header.split(",")
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def accuracy(errors: Sequence[float]) -> str:
    return f"{1 - statistics.mean(map(abs, errors)):.1%}"


def report(arguments: argparse.Namespace) -> str:
    device = arguments.device
    options = options_of(device)
    sizes = OPERATOR_SIZES[device][:: 4 if arguments.small else 1]
    base = load_device(arguments.base or "cpu")
    plain = replace(base, layer_forward_ns=0, layer_backward_ns=0)
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, {device}, torch {torch.__version__}, "
        f"{arguments.repeats} rounds, load {os.getloadavg()[0]:.1f}"
        + (f", {torch.cuda.get_device_name()}" if device == "cuda" else ", one thread"),
        "",
    ]
    with one_rank(device):
        chosen = cases(device, small=arguments.small)
        probes = ProbeRounds(device, sizes, options=options)
        made = [Chunk(case, device) for case in chosen]
        seen = [Timed(chunk, size) for chunk in made for size in chunk.case.seen]
        held_out = [
            Timed(chunk, size, strategy)
            for strategy in STRATEGIES[device]
            for chunk in made
            for size in chunk.case.held_out
        ]
        timed_rounds(arguments.repeats, probes, [*seen, *held_out])
        fitted = calibrate(probes.samples(), plain)
        lines += table(
            "operator class,held-out error",
            [[kind.value, f"{error:.1%}"] for kind, error in fitted.held_out_error.items()],
        )
        bare = AnalyticCostModel(fitted.profile, options)
        costs = AnalyticCostModel(
            with_layer_times(fitted.profile, layer_samples(bare, seen)), options
        )
        lines += time_lines(costs, held_out)
        lines += memory_lines(costs, held_out)
    return "\n".join(lines) + "\n"


def time_lines(costs: AnalyticCostModel, held_out: Sequence[Timed]) -> list[str]:
    rows = []
    errors: dict[LayerStrategy, dict[str, list[float]]] = {}
    for one in held_out:
        strategy, name = one.strategy, one.case.module.name
        predicted, measured = sum(predicted_ns(costs, one.case, one.size, strategy)), one.both_ns()
        error = predicted / measured - 1
        errors.setdefault(strategy, {}).setdefault(name, []).append(error)
        rows.append(
            [
                strategy.value,
                name,
                f"{one.size[0]} x {one.size[1]}",
                f"{measured / 1e6:.2f}",
                f"{predicted / 1e6:.2f}",
                f"{error:+.1%}",
            ]
        )
    lines = table("strategy,chunk,sequence x batch,measured ms,predicted ms,error", rows)
    for strategy, by_name in errors.items():
        for name, some in by_name.items():
            lines.append(f"- time, {strategy}, {name}: {accuracy(some)}")
    kept = errors[LayerStrategy.KEEP]
    pairs = [*kept["vision"], *kept["language"]]
    everything = [
        error for by_name in errors.values() for some in by_name.values() for error in some
    ]
    return [
        *lines,
        f"- **time, ViT and LM chunks, everything kept: {accuracy(pairs)}**",
        f"- time, all chunks and strategies: {accuracy(everything)}",
        "",
    ]


def memory_lines(costs: AnalyticCostModel, held_out: Sequence[Timed]) -> list[str]:
    rows, errors = [], []
    for one in held_out:
        held, peak = predicted_bytes(costs, one.case, one.size, one.strategy)
        found = one.chunk.weigh(one.size, one.strategy)
        what, measured, predicted = (
            ("kept", found.held_bytes, held)
            if found.peak_bytes is None
            else ("peak", found.peak_bytes, peak)
        )
        errors.append(predicted / measured - 1)
        rows.append(
            [
                one.strategy.value,
                one.case.module.name,
                f"{one.size[0]} x {one.size[1]}",
                what,
                f"{measured / MIB:.2f}",
                f"{predicted / MIB:.2f}",
                f"{errors[-1]:+.1%}",
            ]
        )
    header = "strategy,chunk,sequence x batch,memory,measured MiB,predicted MiB,error"
    return [*table(header, rows), f"- **memory: {accuracy(errors)}**"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", help="profile with the device's data-sheet rates (cuda)")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--small", action="store_true", help="few sizes, to try the script out")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("semu_accuracy: this machine has no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and arguments.base is None:
        print("semu_accuracy: --device cuda needs --base, such as H100", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and not os.environ.keys() >= KEEP_FREED_MEMORY.keys():
        # The allocator reads them when a process starts.
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, **KEEP_FREED_MEMORY},
        )
    torch.set_num_threads(1)
    try:
        text = report(arguments)
    except PipeWeaverError as error:
        print(f"semu_accuracy: {error}", file=sys.stderr)
        return 2
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
