"""How long emulating VLM-L's batch of 64 microbatches takes: cold, warm, and without reuse.

python benchmarks/semu_speed/run.py [--workload-only]

Times are processor times of one thread.
"""

import os
import platform
import random
import sys
import time

from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.partition.workload import loads, make_workload
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import StageShape
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import setup_preset
from megatron_pipeweaver.semu.reuse import Reuse

SETUP = setup_preset("vlm-l")
IMAGE = Item(units=2704, tokens=169)
SIZES = {"vision": 12}
LAYOUT = make_layout(SETUP.model, 8, {"language": 2})
WARM_RUNS = 50


def batch() -> BatchMetadata:
    source = random.Random(0)
    return BatchMetadata(
        microbatches=tuple(
            MicrobatchMetadata(
                sequence_length=8192, items={"vision": (IMAGE,) * source.randint(0, 48)}
            )
            for _ in range(64)
        )
    )


def one_layer_at_a_time(model: ModelSpec, costs: AnalyticCostModel) -> None:
    """Every layer of every pass on its own: what emulation costs when nothing is reused."""
    layer = StageShape(layers=1, is_first=False, is_last=False)
    for name, load in loads(batch(), model, SIZES):
        for _ in range(model.module(name).layers):
            costs.stage_strategies(model.module(name), layer, load)


def milliseconds(start_ns: int) -> float:
    return (time.process_time_ns() - start_ns) / 1e6


def main() -> None:
    options = RunOptions(parallel=SETUP.parallel)
    device = load_device("H800")
    costs = AnalyticCostModel(device, options)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    metadata = batch()
    times = []
    for _ in range(1 + WARM_RUNS):
        start = time.process_time_ns()
        make_workload(
            metadata, SETUP.model, LAYOUT, SIZES, costs, [60 << 30] * 8, parallel=SETUP.parallel
        )
        times.append(milliseconds(start))
    warm = sorted(times[1:])
    print(f"cold: {times[0]:.1f} ms")
    print(
        f"warm, {WARM_RUNS} runs: median {warm[len(warm) // 2]:.2f} ms, fastest {warm[0]:.2f} ms, "
        f"slowest {warm[-1]:.2f} ms"
    )
    if "--workload-only" in sys.argv:
        return
    spent = {}
    for enabled in (True, False):
        start = time.process_time_ns()
        one_layer_at_a_time(
            SETUP.model, AnalyticCostModel(device, options, reuse=Reuse(enabled=enabled))
        )
        spent[enabled] = milliseconds(start)
        print(f"layer by layer, reuse {enabled}: {spent[enabled]:.1f} ms")
    print(f"reuse makes it {spent[False] / spent[True]:.0f} times as fast")


if __name__ == "__main__":
    main()
