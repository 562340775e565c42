"""Collectives measured between gloo ranks, and the profile that comes of them."""

import os
import socket
from pathlib import Path

from megatron_pipeweaver.cli.main import main
from megatron_pipeweaver.semu.calibration import Sample, calibrate
from megatron_pipeweaver.semu.collectives import measure_collectives
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.work import OperatorClass, Phase
from tests.distributed.harness import RankContext, run_on_ranks

SENDING = {
    OperatorClass.ALL_REDUCE,
    OperatorClass.ALL_GATHER,
    OperatorClass.REDUCE_SCATTER,
    OperatorClass.ALL_TO_ALL,
    OperatorClass.RING_EXCHANGE,
    OperatorClass.SEND,
}


def _measured(ctx: RankContext) -> list[Sample]:
    ctx.note("measuring collectives")
    return measure_collectives("cpu", sizes=[1 << power for power in (10, 12, 14, 16)], repeats=1)


def test_all_collectives_are_measured_alike_on_all_ranks() -> None:
    first, second = run_on_ranks(_measured, 2)
    assert first == second  # the slowest rank's times, everywhere
    assert {one.operator.kind for one in first} == SENDING
    assert all(one.times_ns[Phase.FORWARD] > 0 for one in first)
    reduced = [one.operator.forward for one in first if one.operator.kind == "all_reduce"]
    assert [work.network_bytes for work in reduced] == [1 << power for power in (10, 12, 14, 16)]
    fitted = calibrate(first, load_device("cpu")).profile
    assert set(fitted.factors) >= SENDING


def _calibrated(ctx: RankContext, port: int, file: str) -> int:
    """The verb makes its own group, from what torchrun says."""
    os.environ |= {
        "WORLD_SIZE": str(ctx.size),
        "RANK": str(ctx.rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sizes = ["8x32", "16x32", "16x64", "32x64"]
    flags = ["--device", "cpu", "-o", file, "--sizes", *sizes, "--repeats", "1"]
    return main(["calibrate", *flags])


def test_calibrate_on_several_ranks_writes_one_profile(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    file = tmp_path / "device.json"
    assert run_on_ranks(_calibrated, 2, port, str(file), initialise=False) == [0, 0]
    profile, base = load_device(str(file)), load_device("cpu")
    assert profile.factors_of(OperatorClass.MATMUL) != base.factors_of(OperatorClass.MATMUL)
    for kind in SENDING:
        assert profile.factors_of(kind) != base.factors_of(kind)
