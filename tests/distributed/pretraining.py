"""Jobs of `megatron.training.pretrain` on gloo ranks, and what Megatron told of them."""

from __future__ import annotations

import gc
import importlib.util
import math
import multiprocessing
import shlex
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import RerunStateMachine, get_rerun_state_machine

from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from tests.distributed.harness import RankContext

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
MICROBATCHES = 4
"""Microbatches of a global batch, all replicas' together."""
MODEL = shlex.split(
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-masked-softmax-fusion "
    "--encoder-num-layers 2 --decoder-num-layers 4 --hidden-size 32 --num-attention-heads 4 "
    "--seq-length 32 --max-position-embeddings 64 --micro-batch-size 1 "
    "--img-h 8 --img-w 8 --patch-dim 4 --vocab-size 63 --make-vocab-size-divisible-by 32 "
    "--position-embedding-type rope --use-cpu-initialization --init-method-std 0.1 "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --lr-decay-style constant "
    "--num-workers 0 --log-interval 1 --eval-iters 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One job: its flags, and how long it trains, evaluating once at the end.

    `script` is ``pretrain_vlm.py``, or another that is run through the launcher. `length` replaces
    the flags that follow from `iterations`; all images of iteration `poisoned` are NaN. Every
    iteration but the first is run twice if `suspicious`.
    """

    flags: Sequence[str]
    iterations: int = 20
    images: int = 3
    length: Sequence[str] = ()
    script: str = "pretrain_vlm.py"
    poisoned: int | None = None
    suspicious: bool = False

    def command(self, directory: Path) -> list[str]:
        """The script and its arguments; ``{directory}`` in a flag becomes `directory`."""
        count = str(self.iterations)
        length = self.length or (
            *("--train-iters", count, "--eval-interval", count),
            *("--global-batch-size", str(MICROBATCHES)),
        )
        own = [] if self.script != "pretrain_vlm.py" else ["--max-images", str(self.images)]
        flags = [*MODEL, *length, *own, *self.flags]
        return [self.script, *(one.replace("{directory}", str(directory)) for one in flags)]


@dataclass(slots=True)
class Heard:
    """What one rank was told of a job, by iteration where it has one per iteration."""

    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    loss_scales: dict[int, float] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    virtual_size: int | None = None
    exit_code: int | None = None
    reruns: list[str] = field(default_factory=list)
    wandb: dict[str, list[float]] = field(default_factory=dict)


def close(found: Heard, expected: Heard, *, since: int = 1) -> None:
    """`found` has the losses of `expected`, every one from iteration `since` on."""
    numbers = [one for one in expected.losses if one >= since]
    assert list(found.losses) == numbers
    for iteration in numbers:
        loss, norm = expected.losses[iteration], expected.grad_norms[iteration]
        assert found.losses[iteration] == pytest.approx(loss, rel=1e-5, abs=0), iteration
        assert found.grad_norms[iteration] == pytest.approx(norm, rel=1e-4, abs=0), iteration
    assert found.evaluated == pytest.approx(expected.evaluated, rel=1e-5, abs=0)


def train(ctx: RankContext, runs: Mapping[str, Run], directory: Path) -> dict[str, Heard]:
    """All `runs`, one after the other, in the same processes; what this rank heard of each."""
    # Megatron writes checkpoints in a process of their own, which daemons may not have.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    from megatron.training.training import destroy_global_state

    found = {}
    for number, (name, run) in enumerate(runs.items()):
        ctx.note(f"{name}: {' '.join(run.flags)}")
        renew_groups(ctx, number)
        heard = Heard()
        with overheard(heard):
            try:
                assert start(run, directory) == 0
            except SystemExit as end:  # Megatron's own end of a process
                heard.exit_code = int(end.code or 0)
        destroy_global_state()
        found[name] = heard
    return found


def renew_groups(ctx: RankContext, number: int) -> None:
    """Let go of all process groups, whose sockets and threads add up, and begin with a new one."""
    dist.destroy_process_group()
    gc.collect()  # models and optimizers in cycles hold groups
    file = ctx.directory / f"rendezvous-{number}"
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=ctx.rank, world_size=ctx.size
    )


def start(run: Run, directory: Path) -> int:
    """Run the job's script as its user would; returns its exit code."""
    command = run.command(directory)
    if run.script != "pretrain_vlm.py":
        from megatron_pipeweaver.launch import main

        return main([str(Path(__file__).with_name(command[0])), *command[1:]])
    script = load_script()
    script.Samples = shifting_samples(script.Samples, run.poisoned)
    if run.suspicious:
        script.refuse_wrong_loss = suspect
    sys.argv = command
    code: int = script.main()
    return code


def load_script() -> Any:
    """`scripts/pretrain_vlm.py` as a module."""
    folder = ROOT / "scripts"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("pretrain_vlm", folder / "pretrain_vlm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def suspect(loss: torch.Tensor) -> None:
    """Has Megatron find every loss strange, run the iteration again, and go on."""
    get_rerun_state_machine().validate_result(
        result=loss.detach().clone(),
        rejection_func=lambda _: True,
        message="suspicious",
        fatal=False,
    )


def shifting_samples(samples: type, poisoned: int | None) -> type:
    """`samples` whose batches 6 to 10 have replicas with text alone beside others with images.

    All images of batch `poisoned` are NaN.
    """

    class Shifting(samples):  # type: ignore[misc]
        def __init__(self, options: Any) -> None:
            super().__init__(options)
            self._text = samples(replace(options, max_images=0))

        def microbatch(self, first: int, count: int) -> Any:
            iteration, place = divmod(first // count, MICROBATCHES)
            if 5 <= iteration < 10 and place % 2:
                return self._text.microbatch(first, count)
            made = super().microbatch(first, count)
            if iteration + 1 == poisoned:
                made["images"].fill_(math.nan)
            return made

    return Shifting


@contextmanager
def overheard(heard: Heard) -> Iterator[None]:
    """Megatron's log of a job, written down in `heard`; Weights & Biases as a module that hears."""
    from megatron.training import get_args, training

    log, evaluate = training.training_log, training.evaluate

    def hear(
        loss_dict: Any, total: Any, rate: Any, iteration: int, scale: Any, *more: Any, **named: Any
    ) -> Any:
        _, skipped, grad_norm = more[:3]
        if "lm loss" in loss_dict:
            heard.losses[iteration] = float(loss_dict["lm loss"])
        if grad_norm is not None:
            heard.grad_norms[iteration] = float(grad_norm)
        if skipped:
            heard.skipped.append(iteration)
        heard.loss_scales[iteration] = float(scale)
        heard.virtual_size = get_args().virtual_pipeline_model_parallel_size
        return log(loss_dict, total, rate, iteration, scale, *more, **named)

    def hear_evaluation(*arguments: Any, **named: Any) -> Any:
        found = evaluate(*arguments, **named)
        if "lm loss" in found[0]:
            heard.evaluated.append(float(found[0]["lm loss"]))
        return found

    def hear_rerun(_: Any, status: Any, **__: Any) -> None:
        heard.reruns.append(status.value)

    patches = [
        Patch(training, "training_log", hear),
        Patch(training, "evaluate", hear_evaluation),
        Patch(RerunStateMachine, "_log_validation_error_to_file", hear_rerun),
    ]
    sys.modules["wandb"] = wandb_stub(heard)
    try:
        with PatchSet(patches):
            yield
    finally:
        del sys.modules["wandb"]


def wandb_stub(heard: Heard) -> types.ModuleType:
    """What Megatron needs of `wandb`, which the tests do without."""
    module: Any = types.ModuleType("wandb")

    def log(numbers: Mapping[str, Any], step: int | None = None) -> None:
        for name, number in numbers.items():
            heard.wandb.setdefault(name, []).append(float(number))

    module.log, module.config = log, {}
    module.init = lambda **_: None
    module.finish = lambda: None
    return module  # type: ignore[no-any-return]
