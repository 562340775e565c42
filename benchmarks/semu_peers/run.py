"""Emulated against published iteration times of GPT models on A100, next to Calculon's errors.

    python -m benchmarks.semu_peers.run > benchmarks/semu_peers/result.md

Facts: model sizes, parallel sizes and measured times per iteration from Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (2022), tables 3 and 5; Calculon's
predictions of the same rows as its own validation prints them (Isaev et al., "Calculon", SC 2023).

First the shipped A100 profile, no factor of which was fitted to these rows; then two factors of
matmuls (rate, half sizes) fitted to the smallest and the largest model, and held to the other two.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_pipeweaver.ir.batch import BatchMetadata, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.partition.workload import make_workload
from megatron_pipeweaver.search.baselines import interleaved_1f1b
from megatron_pipeweaver.semu.devices import DeviceProfile, load_device
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.memory import OptimizerOptions
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.step import emulate_step, training_flops
from megatron_pipeweaver.semu.work import OperatorClass

SEQUENCE = 2048
VOCABULARY = 51200
FITTED = ("22B", "1T")
RATES = (750, 800, 850, 900)
HALF_SIZES = (0, 48, 96, 144, 192, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model, and seconds per iteration: measured, and predicted by Calculon."""

    name: str
    layers: int
    hidden: int
    heads: int
    pipeline: int
    segments: int
    samples: int
    microbatches: int
    full: tuple[float, float]
    selective: tuple[float, float]


ROWS = (
    Row(
        name="22B",
        layers=48,
        hidden=6144,
        heads=64,
        pipeline=1,
        segments=1,
        samples=4,
        microbatches=1,
        full=(1.42, 1.40),
        selective=(1.10, 1.14),
    ),
    Row(
        name="175B (GPT-3)",
        layers=96,
        hidden=12288,
        heads=96,
        pipeline=8,
        segments=3,
        samples=1,
        microbatches=64,
        full=(18.13, 18.03),
        selective=(13.75, 13.64),
    ),
    Row(
        name="530B (Turing-NLG)",
        layers=105,
        hidden=20480,
        heads=128,
        pipeline=35,
        segments=3,
        samples=1,
        microbatches=280,
        full=(49.05, 49.89),
        selective=(37.83, 34.47),
    ),
    Row(
        name="1T",
        layers=128,
        hidden=25600,
        heads=160,
        pipeline=64,
        segments=1,
        samples=1,
        microbatches=512,
        full=(94.42, 90.08),
        selective=(71.49, 66.04),
    ),
)


def model_of(row: Row) -> ModelSpec:
    """A GPT: layer norm, GELU, biases, learned positions, tied embeddings."""
    gpt = ModuleSpec(
        name="language",
        kind=ModuleKind.LANGUAGE,
        layers=row.layers,
        hidden_size=row.hidden,
        ffn_hidden_size=4 * row.hidden,
        attention_heads=row.heads,
        kv_groups=row.heads,
        vocab_size=VOCABULARY,
        tied_embeddings=True,
        layer=LayerOptions(positions=SEQUENCE),
    )
    return ModelSpec(name=row.name, modules=(gpt,))


def emulated_s(row: Row, device: DeviceProfile, *, selective: bool) -> tuple[float, float]:
    """Seconds per iteration, and MFU: full recomputation, or sequence parallel and selective."""
    model = model_of(row)
    parallel = ParallelSizes(pipeline=row.pipeline, tensor=8, sequence_parallel=selective)
    # Before fused attention: scores and probabilities are there, and dropout was on.
    options = RunOptions(parallel=parallel, attention=Attention.DENSE, dropout=True)
    strategy = LayerStrategy.ATTENTION if selective else LayerStrategy.RECOMPUTE
    costs = AnalyticCostModel(device, options, strategies=(strategy,))
    layout = make_layout(model, row.pipeline, {"language": row.segments})
    one = MicrobatchMetadata(sequence_length=SEQUENCE, samples=row.samples)
    batch = BatchMetadata(microbatches=(one,) * row.microbatches)
    workload = make_workload(
        batch, model, layout, {}, costs, [1 << 50] * row.pipeline, parallel=parallel
    )
    load = Load(sequence=SEQUENCE, batch=row.samples, lengths=(SEQUENCE,) * row.samples)
    step = emulate_step(
        schedule=interleaved_1f1b(workload.problem),
        model=model,
        layout=layout,
        costs=costs,
        model_flops=row.microbatches * training_flops(model.backbone, load, options),
        optimizer=OptimizerOptions(distributed=False),
    )
    return step.iteration_ns / 1e9, step.mfu


def errors_of(rows: tuple[Row, ...], device: DeviceProfile) -> list[float]:
    """Relative errors, full and selective of each row."""
    return [
        emulated_s(row, device, selective=selective)[0] / measured - 1
        for row in rows
        for selective, (measured, _) in ((False, row.full), (True, row.selective))
    ]


def candidates(device: DeviceProfile) -> Iterator[DeviceProfile]:
    """Profiles with other rates and half sizes of matmuls."""
    for rate, half in product(RATES, HALF_SIZES):
        matmul = replace(
            device.factors_of(OperatorClass.MATMUL), compute_permille=rate, half_sizes=(half,) * 3
        )
        yield replace(device, factors={**device.factors, OperatorClass.MATMUL: matmul})


def mean_error(errors: list[float]) -> float:
    """Mean of the errors' sizes."""
    return statistics.mean(map(abs, errors))


def table(rows: tuple[Row, ...], device: DeviceProfile) -> list[str]:
    """Every row next to Calculon's prediction of it, and both means."""
    lines = [
        "| model | recomputation | measured s | emulated s | error | Calculon s | error | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours, theirs = [], []
    for row in rows:
        for selective in (False, True):
            measured, calculon = row.selective if selective else row.full
            found, mfu = emulated_s(row, device, selective=selective)
            ours.append(found / measured - 1)
            theirs.append(calculon / measured - 1)
            how = "selective, sequence parallel" if selective else "full"
            lines.append(
                f"| {row.name} | {how} | {measured:.2f} | {found:.2f} | {ours[-1]:+.1%} "
                f"| {calculon:.2f} | {theirs[-1]:+.1%} | {mfu:.1%} |"
            )
    means = [
        f"- {who}: mean error {mean_error(errors):.2%}, largest {max(map(abs, errors)):.2%}"
        for who, errors in (("SEMU", ours), ("Calculon", theirs))
    ]
    return [*lines, "", *means, ""]


def main() -> int:
    device = load_device("A100")
    start = time.process_time()
    seen = tuple(row for row in ROWS if row.name in FITTED)
    held_out = tuple(row for row in ROWS if row.name not in FITTED)
    fitted = min(candidates(device), key=lambda one: mean_error(errors_of(seen, one)))
    matmul = fitted.factors_of(OperatorClass.MATMUL)
    lines = [
        "## The shipped A100 profile, nothing fitted",
        "",
        *table(ROWS, device),
        f"## Matmul rate {matmul.compute_permille / 1000:.0%}, half sizes {matmul.half_sizes[0]}: "
        f"fitted to {' and '.join(FITTED)}, the others held out",
        "",
        *table(held_out, fitted),
        f"Emulated in {time.process_time() - start:.1f} s of processor time, the fit included.",
    ]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
