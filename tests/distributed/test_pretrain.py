"""`scripts/pretrain_vlm.py` in Megatron's training loop: the losses of plain Megatron."""

from __future__ import annotations

import importlib.util
import multiprocessing
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from tests.distributed.harness import RankContext, run_on_ranks

if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core has no megatron.training", allow_module_level=True)

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
MODEL = shlex.split(
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-masked-softmax-fusion "
    "--encoder-num-layers 4 --decoder-num-layers 4 --hidden-size 32 --num-attention-heads 4 "
    "--seq-length 32 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8 "
    "--img-h 8 --img-w 8 --patch-dim 4 --vocab-size 63 --make-vocab-size-divisible-by 32 "
    "--position-embedding-type rope --use-cpu-initialization --init-method-std 0.1 "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --lr-decay-style constant "
    "--num-workers 0 --log-interval 1 --eval-iters 1"
)
WAITING = shlex.split(
    "--pipeweaver --pipeweaver-fallback wait --pipeweaver-search-seconds 0.02 "
    "--pipeweaver-sub-microbatch vision=2"
)
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One job: its flags, and how many iterations it trains, evaluating once on the way."""

    flags: Sequence[str]
    iterations: int = 5
    images: int = 3

    @property
    def command(self) -> list[str]:
        count = str(self.iterations)
        return [
            *("pretrain_vlm.py", *MODEL, "--train-iters", count, "--eval-interval", count),
            *("--max-images", str(self.images), *self.flags),
        ]


@dataclass(slots=True)
class Losses:
    """What one rank was told of a job's losses: `trained` by iteration, and `evaluated`."""

    trained: dict[int, float] = field(default_factory=dict)
    evaluated: list[float] = field(default_factory=list)
    virtual_size: int | None = None


def load_script() -> Any:
    folder = ROOT / "scripts"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("pretrain_vlm", folder / "pretrain_vlm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def overheard(losses: Losses) -> Iterator[None]:
    """Megatron's log of a job, written down in `losses`."""
    from megatron.training import get_args, training

    log, evaluate = training.training_log, training.evaluate

    def hear(
        loss_dict: Any, total: Any, rate: Any, iteration: int, *more: Any, **named: Any
    ) -> Any:
        if "lm loss" in loss_dict:
            losses.trained[iteration] = float(loss_dict["lm loss"])
        losses.virtual_size = get_args().virtual_pipeline_model_parallel_size
        return log(loss_dict, total, rate, iteration, *more, **named)

    def hear_evaluation(*arguments: Any, **named: Any) -> Any:
        found = evaluate(*arguments, **named)
        if "lm loss" in found[0]:
            losses.evaluated.append(float(found[0]["lm loss"]))
        return found

    patches = [
        Patch(training, "training_log", hear),
        Patch(training, "evaluate", hear_evaluation),
    ]
    with PatchSet(patches):
        yield


def train(ctx: RankContext, runs: Sequence[Run]) -> list[Losses]:
    """All `runs`, one after the other, in the same processes."""
    # Megatron writes checkpoints in a process of their own, which daemons may not have.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    script = load_script()
    from megatron.training.training import destroy_global_state

    found = []
    for number, run in enumerate(runs):
        ctx.note(f"run {number}: {' '.join(run.flags)}")
        sys.argv = [one.replace("{directory}", str(ctx.directory)) for one in run.command]
        losses = Losses()
        # At its --exit-interval Megatron ends the process.
        with overheard(losses), suppress(SystemExit):
            assert script.main() == 0
        destroy_global_state()
        found.append(losses)
    return found


def launch_script(ctx: RankContext, runs: Sequence[Run]) -> list[Losses]:
    """All `runs` of a script that knows no PipeWeaver, through the launcher."""
    from megatron_pipeweaver.launch import main

    script = Path(__file__).with_name("llava_script.py")
    from megatron.training.training import destroy_global_state

    found = []
    for run in runs:
        ctx.note(" ".join(run.flags))
        losses = Losses()
        with overheard(losses):
            assert main([str(script), *without_images(run)]) == 0
        destroy_global_state()
        found.append(losses)
    return found


def without_images(run: Run) -> list[str]:
    """The flags of `run` that Megatron knows, and PipeWeaver's."""
    flags = run.command[1:]
    place = flags.index("--max-images")
    return [*flags[:place], *flags[place + 2 :]]


def losses_of(found: Sequence[Sequence[Losses]], number: int) -> Losses:
    """What the last rank, which makes the loss in every layout, was told in run `number`."""
    return found[-1][number]


def pipeline(size: int, *more: str) -> list[str]:
    return ["--pipeline-model-parallel-size", str(size), *WAITING, *more]


PLAIN = Run(flags=())
"""Megatron without PipeWeaver: one pipeline rank, four replicas, the same batches."""
PLAIN_TEXT = Run(flags=(), images=0, iterations=3)
LAYOUTS = {
    "PP 4": Run(flags=pipeline(4, "--pipeweaver-segments", "vision=1,language=1")),
    "PP 2 x DP 2, overlap": Run(
        flags=pipeline(2, *OVERLAP, "--pipeweaver-segments", "vision=1,language=2")
    ),
    "PP 2 x TP 2, sequence parallel": Run(
        flags=pipeline(2, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    ),
}
TEXT_LAYOUTS = {
    "PP 4, text": Run(flags=pipeline(4), images=0, iterations=3),
    "PP 2 x DP 2, overlap, text": Run(flags=pipeline(2, *OVERLAP), images=0, iterations=3),
}


def close(found: Losses, expected: Losses) -> None:
    assert found.trained.keys() == expected.trained.keys()
    for iteration, loss in expected.trained.items():
        assert found.trained[iteration] == pytest.approx(loss, rel=1e-5, abs=0), iteration
    assert found.evaluated == pytest.approx(expected.evaluated, rel=1e-5, abs=0)


def test_losses_are_those_of_megatron_without_pipeweaver() -> None:
    layouts = {**LAYOUTS, **TEXT_LAYOUTS}
    found = run_on_ranks(
        train,
        4,
        [PLAIN, PLAIN_TEXT, *layouts.values()],
        deadline_s=280,
        environment=ENVIRONMENT,
        initialise=True,
    )
    plain = losses_of(found, 0), losses_of(found, 1)
    assert list(plain[0].trained) == [1, 2, 3, 4, 5]
    assert len(plain[0].evaluated) == 3
    assert plain[0].trained[5] < plain[0].trained[1]
    for number, (name, run) in enumerate(layouts.items(), start=2):
        close(losses_of(found, number), plain[run.images == 0])
        assert losses_of(found, number).virtual_size is not None, name
    assert losses_of(found, 2).virtual_size == 2
    assert losses_of(found, 3).virtual_size == 3


def test_a_script_with_a_whole_llava_model_has_the_same_losses_in_chunks() -> None:
    untied = ("--untie-embeddings-and-output-weights",)
    runs = [
        Run(flags=untied, iterations=3),
        Run(flags=pipeline(2, *untied, *OVERLAP), iterations=3),
        Run(flags=[*pipeline(4, *untied), "--pipeweaver-fallback", "static"], iterations=3),
    ]
    found = run_on_ranks(launch_script, 4, runs, deadline_s=200, environment=ENVIRONMENT)
    plain = losses_of(found, 0)
    assert list(plain.trained) == [1, 2, 3]
    for number in (1, 2):
        close(losses_of(found, number), plain)
        assert losses_of(found, number).virtual_size is not None


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not() -> None:
    pytest.importorskip("psutil", reason="Megatron writes checkpoints with psutil")
    stored = ("--ckpt-format", "torch_dist", "--save-interval", "3")
    two = pipeline(2, "--overlap-grad-reduce", "--pipeweaver-deterministic", *stored)
    four = pipeline(4, "--pipeweaver-deterministic", *stored)
    save, load = ("--save", "{directory}/saved"), ("--load", "{directory}/saved")
    runs = [
        Run(flags=two, iterations=6),
        Run(flags=[*two, *save, "--exit-interval", "3"], iterations=6),
        Run(flags=[*two, *load], iterations=6),
        Run(flags=[*four, *load], iterations=6),
        Run(flags=[*stored, *load], iterations=6),
    ]
    found = run_on_ranks(train, 4, runs, deadline_s=250, environment=ENVIRONMENT)
    unbroken = losses_of(found, 0).trained
    assert list(losses_of(found, 1).trained) == [1, 2, 3]
    rest = {iteration: unbroken[iteration] for iteration in (4, 5, 6)}
    assert losses_of(found, 2).trained == rest
    for number in (3, 4):
        assert losses_of(found, number).trained == pytest.approx(rest, rel=1e-5, abs=0)
