"""`scripts/pretrain_t2v.py` in Megatron's training loop: the losses of plain Megatron."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from tests.distributed.harness import RankContext, run_on_ranks

if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core has no megatron.training", allow_module_level=True)

SCRIPTS = Path(__file__).parents[2] / "scripts"
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
MODEL = shlex.split(
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--no-masked-softmax-fusion --encoder-num-layers 2 --text-hidden-size 16 "
    "--text-ffn-hidden-size 32 --text-num-attention-heads 2 --decoder-num-layers 4 "
    "--hidden-size 24 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 48 "
    "--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 4 --prompt-length 8 "
    "--max-clips 3 --latent-channels 4 --img-h 4 --img-w 8 --patch-dim 2 --vocab-size 63 "
    "--make-vocab-size-divisible-by 32 --position-embedding-type rope --qk-layernorm --swiglu "
    "--normalization RMSNorm --disable-bias-linear --use-cpu-initialization "
    "--init-method-std 0.1 --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 "
    "--lr-decay-style constant --train-iters 3 --eval-iters 0 --eval-interval 9 --num-workers 0 "
    "--log-interval 1"
)
RUNS = {
    "plain": "",
    "plain, TP 2": "--tensor-model-parallel-size 2",
    "PP 2": "--pipeline-model-parallel-size 2 --pipeweaver --pipeweaver-fallback wait "
    "--pipeweaver-search-seconds 0.02 --pipeweaver-segments text=1,video=2 "
    "--pipeweaver-sub-microbatch text=2 --use-distributed-optimizer --overlap-grad-reduce",
}


def train(ctx: RankContext, runs: Sequence[str]) -> list[dict[int, tuple[float, float]]]:
    """Loss and gradient's norm of every iteration of `runs`, as this rank logs them."""
    from megatron.training import training

    sys.path.insert(0, str(SCRIPTS))
    script = importlib.import_module("pretrain_t2v")
    log, found = training.training_log, []
    for run in runs:
        ctx.note(run or "plain")
        heard: dict[int, tuple[float, float]] = {}
        sys.argv = ["pretrain_t2v.py", *MODEL, *run.split()]

        def hear(losses: Any, *more: Any, **named: Any) -> Any:
            if "video loss" in losses:
                iteration, norm = more[2], more[6]
                heard[iteration] = float(losses["video loss"]), float(norm)  # noqa: B023
            return log(losses, *more, **named)

        with PatchSet([Patch(training, "training_log", hear)]):
            assert script.main() == 0
        training.destroy_global_state()
        found.append(heard)
    return found


def test_losses_are_those_of_megatron_without_pipeweaver() -> None:
    found = run_on_ranks(
        train, 2, list(RUNS.values()), deadline_s=200, environment=ENVIRONMENT, initialise=True
    )
    plain, *others = found[-1]
    assert list(plain) == [1, 2, 3]
    for name, other in zip(list(RUNS)[1:], others, strict=True):
        assert other.keys() == plain.keys(), name
        for iteration, numbers in plain.items():
            assert other[iteration] == pytest.approx(numbers, rel=1e-5, abs=0), (name, iteration)
