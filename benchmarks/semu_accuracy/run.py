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

from benchmarks.semu_accuracy.chunks import LAYERS, STRATEGIES, LayersChunk, cases, one_rank
from benchmarks.semu_accuracy.whole import whole_chunks
from benchmarks.semu_accuracy.work import Chunk, Size, Times, Weight
from megatron_pipeweaver.errors import PipeWeaverError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.architecture import layer_spec
from megatron_pipeweaver.semu.calibration import (
    CheckpointSample,
    LayerSample,
    calibrate,
    with_checkpoint_times,
    with_layer_times,
)
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.layers import transformer_layer
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.probes import ProbeRounds
from megatron_pipeweaver.semu.stage_costs import StageCosts, StagePart
from megatron_pipeweaver.semu.strategies import checkpoints
from megatron_pipeweaver.semu.work import Phase, Subgraph

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
HOST_BOUND = 0.02
"""A share of the time; a GPU that lags behind the host by less is waiting for it."""


@dataclass(slots=True)
class Timed:
    """One chunk at one size under one strategy: its times over the rounds."""

    chunk: Chunk
    size: Size
    strategy: LayerStrategy = LayerStrategy.KEEP
    times: list[Times] = field(default_factory=list)

    def forward_ns(self) -> int:
        """Median of the forward."""
        return round(statistics.median(one.forward_ns for one in self.times))

    def backward_ns(self) -> int:
        """Median of the backward."""
        return round(statistics.median(one.backward_ns for one in self.times))

    def both_ns(self) -> float:
        """Median of forward plus backward."""
        return statistics.median(one.both_ns for one in self.times)

    def bound_by_host(self) -> bool:
        """Whether a GPU had as good as nothing left to do when the host had issued everything."""
        waited = statistics.median(one.waited_ns / one.both_ns for one in self.times)
        return self.chunk.device == "cuda" and waited < HOST_BOUND

    def costs(self, model: AnalyticCostModel) -> StageCosts:
        """What SEMU says of the stage pair."""
        chunk = self.chunk
        load = chunk.load(self.size)
        return model.layer_strategies(chunk.module, chunk.stage, load, (self.strategy,))

    def predicted_ns(self, model: AnalyticCostModel) -> tuple[int, int]:
        """Emulated forward and backward."""
        one = self.costs(model).uniform(self.strategy)
        return one.forward_ns, one.backward_ns + one.weight_grad_ns

    def predicted_bytes(self, model: AnalyticCostModel) -> Weight:
        """Emulated bytes that are kept, and those with the most that is worked with."""
        costs = self.costs(model)
        parts = [(one.costs[self._of(one)], one.copies) for one in costs.parts]
        held = sum(copies * cost.held_bytes for cost, copies in parts)
        # Context comes from another module, if not from what the stage itself embeds.
        held += costs.context_bytes if self.chunk.stage.is_first else 0
        working = AnalyticCostModel(
            model.profile, model.options, reuse=model.reuse, strategies=(self.strategy,)
        ).working_bytes(self.chunk.module, self.chunk.stage, self.chunk.load(self.size))
        return Weight(held_bytes=held, peak_bytes=held + working)

    def _of(self, part: StagePart) -> LayerStrategy:
        return self.strategy if part.is_layer else LayerStrategy.KEEP


def options_of(device: str) -> RunOptions:
    """How the local layers of megatron-core run: nothing fused, but for what torch fuses itself."""
    if device == "cpu":
        return RunOptions.unfused()
    row = torch.ones(8, device=device, dtype=torch.bfloat16, requires_grad=True)
    normed = torch.nn.functional.rms_norm(row, (8,), torch.ones_like(row))
    fused = "Fused" in type(normed.grad_fn).__name__
    return replace(RunOptions.unfused(element_bytes=2), mask_bytes=1, fused_norm=fused)


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
            times = one.chunk.times(one.size, one.strategy, probes.clock)
            if number:
                one.times.append(times)


def graph_of(timed: Timed, options: RunOptions) -> Subgraph:
    """One layer of a chunk of layers, as SEMU counts it."""
    chunk = timed.chunk
    return transformer_layer(layer_spec(chunk.module), chunk.load(timed.size), options)


def layer_samples(costs: AnalyticCostModel, seen: Sequence[Timed]) -> list[LayerSample]:
    """What calibration of layers is given: kept chunks at the sizes that it may see."""
    return [
        LayerSample(
            forward_kernels=LAYERS * graph.kernels(Phase.FORWARD),
            backward_kernels=LAYERS
            * (graph.kernels(Phase.INPUT_GRAD) + graph.kernels(Phase.WEIGHT_GRAD)),
            emulated_forward_ns=forward,
            emulated_backward_ns=backward,
            forward_ns=one.forward_ns(),
            backward_ns=one.backward_ns(),
        )
        for one in seen
        for forward, backward in [one.predicted_ns(costs)]
        for graph in [graph_of(one, costs.options)]
    ]


CHECKPOINTED = (LayerStrategy.NORM, LayerStrategy.ATTENTION)
"""Strategies whose chunks, at two of the sizes that it may see, calibration is given as well."""


def checkpoint_samples(costs: AnalyticCostModel, seen: Sequence[Timed]) -> list[CheckpointSample]:
    """What calibration of checkpoints is given."""
    found = []
    for one in seen:
        forward, backward = one.predicted_ns(costs)
        found.append(
            CheckpointSample(
                checkpoints=LAYERS * checkpoints(one.strategy, graph_of(one, costs.options)),
                emulated_forward_ns=forward,
                emulated_backward_ns=backward,
                forward_ns=one.forward_ns(),
                backward_ns=one.backward_ns(),
            )
        )
    return found


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
    plain = replace(
        base,
        layer_forward_ns=0,
        layer_backward_ns=0,
        layer_forward_permille=1000,
        layer_backward_permille=1000,
        kernel_forward_ns=0,
        kernel_backward_ns=0,
        checkpoint_forward_ns=0,
        checkpoint_backward_ns=0,
    )
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, {device}, torch {torch.__version__}, "
        f"{arguments.repeats} rounds, load {os.getloadavg()[0]:.1f}"
        + (f", {torch.cuda.get_device_name()}" if device == "cuda" else ", one thread"),
        "",
    ]
    with one_rank(device):
        probes = ProbeRounds(device, sizes, options=options)
        layers = [
            (LayersChunk(case, device), case) for case in cases(device, small=arguments.small)
        ]
        seen = [Timed(chunk, size) for chunk, case in layers for size in case.seen]
        compared = [
            *((chunk, case.held_out) for chunk, case in layers),
            *whole_chunks(device, small=arguments.small),
        ]
        held_out = [
            Timed(chunk, size, strategy)
            for strategy in STRATEGIES[device]
            for chunk, sizes_of_chunk in compared
            for size in sizes_of_chunk
        ]
        again = [
            Timed(chunk, size, strategy)
            for strategy in CHECKPOINTED
            for chunk, case in layers
            for size in case.seen[1:4:2]
        ]
        timed_rounds(arguments.repeats, probes, [*seen, *again, *held_out])
        fitted = calibrate(probes.samples(), plain)
        lines += table(
            "operator class,held-out error",
            [[kind.value, f"{error:.1%}"] for kind, error in fitted.held_out_error.items()],
        )
        bare = AnalyticCostModel(fitted.profile, options)
        profile = with_layer_times(fitted.profile, layer_samples(bare, seen))
        some = AnalyticCostModel(profile, options)
        profile = with_checkpoint_times(profile, checkpoint_samples(some, again))
        costs = AnalyticCostModel(profile, options)
        lines += time_lines(costs, held_out)
        lines += memory_lines(costs, held_out)
    return "\n".join(lines) + "\n"


def time_lines(costs: AnalyticCostModel, held_out: Sequence[Timed]) -> list[str]:
    rows = []
    errors: dict[tuple[LayerStrategy, str], list[float]] = {}
    for one in held_out:
        predicted, measured = one.predicted_ns(costs), one.both_ns()
        error = sum(predicted) / measured - 1
        errors.setdefault((one.strategy, one.chunk.name), []).append(error)
        sides = [
            f"{ns / times - 1:+.1%}"
            for ns, times in zip(predicted, (one.forward_ns(), one.backward_ns()), strict=True)
        ]
        times = [f"{measured / 1e6:.2f}", f"{sum(predicted) / 1e6:.2f}", f"{error:+.1%}"]
        rows.append([*_names(one), *times, *sides])
    names = list(dict.fromkeys(name for _, name in errors))
    summary = [
        [strategy.value, *(accuracy(errors[strategy, name]) for name in names)]
        for strategy in dict.fromkeys(strategy for strategy, _ in errors)
    ]

    def mean(*words: str) -> str:
        return accuracy(
            [
                error
                for (_, name), some in errors.items()
                if all(word in name for word in words)
                for error in some
            ]
        )

    pairs = [
        error
        for (strategy, name), some in errors.items()
        if strategy is LayerStrategy.KEEP and name in ("whole vision", "whole language")
        for error in some
    ]
    return [
        *table(
            "strategy,chunk,sequence x batch,measured ms,predicted ms,error,forward,backward", rows
        ),
        *table(",".join(["time by strategy", *names]), summary),
        f"- **time, whole ViT and LM chunks, everything kept: {accuracy(pairs)}**",
        f"- time, whole ViT chunks, every strategy: {mean('whole vision')}",
        f"- time, whole LM chunks, every strategy: {mean('whole language')}",
        f"- time, whole DiT chunks, every strategy: {mean('whole diffusion')}",
        f"- time, layers alone, every strategy: {mean('layers')}",
        f"- time, all chunks and strategies: {mean()}",
        *host_bound_lines(held_out),
        "",
    ]


def host_bound_lines(held_out: Sequence[Timed]) -> list[str]:
    """Says which chunks a GPU ran faster than the host could issue them, if any."""
    slow = [" ".join(_names(one)) for one in held_out if one.bound_by_host()]
    return [f"- bound by the host, not the GPU: {'; '.join(slow)}"] if slow else []


def _names(one: Timed) -> list[str]:
    return [one.strategy.value, one.chunk.name, f"{one.size[0]} x {one.size[1]}"]


def memory_lines(costs: AnalyticCostModel, held_out: Sequence[Timed]) -> list[str]:
    rows = []
    kept_errors, peak_errors = [], []
    for one in held_out:
        predicted, measured = one.predicted_bytes(costs), one.chunk.weigh(one.size, one.strategy)
        kept = predicted.held_bytes / measured.held_bytes - 1
        peak = predicted.peak_bytes / measured.peak_bytes - 1
        kept_errors.append(kept)
        peak_errors.append(peak)
        rows.append(
            [
                *_names(one),
                *(f"{size / MIB:.2f}" for size in (measured.held_bytes, predicted.held_bytes)),
                f"{kept:+.1%}",
                *(f"{size / MIB:.2f}" for size in (measured.peak_bytes, predicted.peak_bytes)),
                f"{peak:+.1%}",
            ]
        )
    header = "strategy,chunk,sequence x batch,kept MiB,predicted,error,peak MiB,predicted,error"
    return [
        *table(header, rows),
        f"- memory kept: {accuracy(kept_errors)}",
        f"- **peak memory: {accuracy(peak_errors)}**",
    ]


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
