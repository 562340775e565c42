r"""Four ranks on one GPU, or on four: PipeWeaver beside Megatron's interleaved function, measured.

    bash scripts/gpu_check.sh            # starts MPS and sets NCCL's multi-rank switch
    python -m benchmarks.gpu.shared --size small -o shared.csv     # the same code on a CPU

First every link of the pipeline carries a message, which tells in seconds whether NCCL takes ranks
that share a device, and rank 0 measures operators in its share of the device, the others waiting:
plans are made with these costs. Then a language model of real chunks trains by both schedule
functions, by turns and on the same batches; Megatron's function takes microbatches of one length,
so text is what both can run. Batches with images, ever another number of them, follow by
PipeWeaver alone, beside what was planned. As in training, where the planner has the iteration
before to itself, plans are searched ahead: what is timed takes a plan, agrees on it, and runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.turns import Row, timed, told_medians, write_rows
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.planner.planner import Planner, batch_digest
from megatron_pipeweaver.planner.settings import CostSettings, PlannerSettings
from megatron_pipeweaver.planner.source import InProcessSource, PlanAnswer
from megatron_pipeweaver.plugin.data import describe_batch
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from megatron_pipeweaver.plugin.training import found_device
from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport
from megatron_pipeweaver.semu.calibration import calibrate
from megatron_pipeweaver.semu.devices import DeviceProfile, load_device
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.probes import ProbeRounds
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import Case, Microbatch, Trainer, installed, megatron_ranks
from tests.unit.models.examples import (
    IMAGE,
    OPTIONS,
    VOCABULARY,
    cut,
    language_only,
    vision_language,
)

_log = logging.getLogger("shared")

RANKS = 4
SYSTEMS = ("pipeweaver", "megatron", "planned")
PATCH = 2
IMAGES_PER_PASS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large everything is: widths, tokens of text, pixels of an image, sizes of probes."""

    width: int
    heads: int
    text: int
    pixels: int
    probes: tuple[tuple[int, int], ...]

    @property
    def patches(self) -> int:
        """Patches, and tokens, of an image."""
        return (self.pixels // PATCH) ** 2


SIZES: Mapping[str, Size] = {
    "small": Size(
        width=8, heads=2, text=4, pixels=4, probes=((16, 16), (32, 16), (32, 32), (64, 32))
    ),
    "large": Size(
        width=2048,
        heads=16,
        text=512,
        pixels=28,
        probes=((512, 2048), (1024, 2048), (2048, 2048), (2048, 4096), (4096, 2048)),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run is asked for."""

    size: str
    repeats: int
    microbatches: int
    search_ns: int


def work(ctx: RankContext, run: Run) -> list[Row]:
    """Rank 0's rows: (batches, repeat, PipeWeaver's ns, Megatron's ns, planned ns)."""
    on_gpu = torch.cuda.is_available()
    # One of its own for each rank where there are enough, or else the first one for all.
    own = ctx.rank if torch.cuda.device_count() >= RANKS else 0
    device = torch.device("cuda", own) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{ctx.directory / 'rendezvous'}",
        rank=ctx.rank,
        world_size=ctx.size,
    )
    group = dist.new_group(backend="gloo")
    ctx.note("a message over every link")
    check_links(ctx.rank, device)
    ctx.note("calibration on rank 0")
    size = SIZES[run.size]
    profile = calibrated(size, device.type) if ctx.rank == 0 else load_device(found_device())
    dist.barrier(group)
    rows: list[Row] = []
    for kind, case in cases(size).items():
        with megatron_ranks(RANKS, case.layout.virtual_size) as groups:
            trainer = Trainer(case, groups)
            config = trainer.model[0].config
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False
            config.deallocate_pipeline_outputs = on_gpu  # gloo may still be sending them
            ahead = PlansAhead(planner_for(case, profile, free_bytes(on_gpu), run.search_ns))
            schedule = PipeWeaverSchedule(ahead, case.describe, wait_timeout=timedelta(minutes=2))
            for repeat in range(-1, run.repeats):  # the first one warms up
                data = draw(kind, size, run.microbatches, repeat, case.options.params_dtype)
                ctx.note(f"{kind} {repeat}: planning")
                planned_ns = ahead.plan(describe_batch(data, case.describe)) if not ctx.rank else 0
                times: dict[str, int] = {}
                systems = SYSTEMS[: 2 if kind == "text" else 1]
                for system in systems if repeat % 2 else systems[::-1]:
                    ctx.note(f"{kind} {repeat}: {system}")
                    ours = installed(schedule) if system == SYSTEMS[0] else nullcontext()
                    with ours:
                        times[system] = timed(partial(iteration, trainer, data), group)
                if repeat >= 0:
                    rows.append((kind, repeat, *map(times.get, SYSTEMS[:2]), planned_ns))
    return rows


def iteration(trainer: Trainer, data: list[Microbatch]) -> None:
    """One iteration, to the device's last work."""
    trainer.step(data)
    torch.cuda.synchronize()


class PlansAhead(InProcessSource):
    """Plans of batches that were planned before anyone asked for them; a `PlanSource`."""

    def __init__(self, planner: Planner) -> None:
        super().__init__(planner)
        self._made: dict[str, PlanAnswer] = {}

    def plan(self, batch: BatchMetadata | None) -> int:
        """Plan `batch` now; the planned nanoseconds of its iteration."""
        assert batch is not None  # rank 0 draws its data
        answer = super().collect(batch, forward_only=False)
        self._made[batch_digest(batch)] = answer
        planned = answer.planned()
        assert planned is not None  # it was planned here
        return planned.schedule.makespan_ns

    def collect(self, batch: BatchMetadata, *, forward_only: bool) -> PlanAnswer:
        """The plan that was made; a search here would count as training.

        Raises:
            ConfigError: `batch` was not planned ahead.
        """
        answer = self._made.pop(batch_digest(batch), None)
        if answer is None or forward_only:
            raise ConfigError("shared: this batch was not planned ahead; call plan() first")
        return answer


def run_options() -> RunOptions:
    """How Megatron's own layers run here: nothing fused, in bf16 on a GPU."""
    on_gpu = torch.cuda.is_available()
    options = RunOptions.unfused(element_bytes=2 if on_gpu else 4)
    return dataclasses.replace(
        options,
        mask_bytes=1 if on_gpu else options.mask_bytes,
        parallel=ParallelSizes(pipeline=RANKS),
    )


def calibrated(size: Size, device: str) -> DeviceProfile:
    """This process's share of the device as it is: the layers' operators, measured alone."""
    rounds = ProbeRounds(device, size.probes, options=run_options())
    for _ in range(3):
        rounds.run()
    return calibrate(rounds.samples(), load_device(found_device())).profile


def free_bytes(on_gpu: bool) -> int:
    """What a rank may hold of activations: a share of what is free now, part of it left alone."""
    if not on_gpu:
        return 1 << 30
    free, _ = torch.cuda.mem_get_info()
    sharing = 1 if torch.cuda.device_count() >= RANKS else RANKS
    return free * 6 // (10 * sharing)


def planner_for(case: Case, profile: DeviceProfile, capacity_bytes: int, search_ns: int) -> Planner:
    """The planner that training would have, with measured costs."""
    dtype = str(case.options.params_dtype).removeprefix("torch.")
    return PlannerSettings(
        model=case.spec,
        layout=case.layout,
        costs=CostSettings(device=profile, options=run_options()),
        sub_microbatch={one.name: case.images_per_pass for one in case.spec.modules[:-1]},
        memory_capacity_bytes=(capacity_bytes,) * RANKS,
        dtypes={one.name: dtype for one in case.spec.modules},
        search=SearchConfig(time_budget_ns=search_ns),
    ).make()


def check_links(rank: int, device: torch.device) -> None:
    """Every rank sends its number to the next one."""
    transport = ProcessGroupTransport([range(RANKS)], device=device, timeout=timedelta(seconds=60))
    target, source = (rank + 1) % RANKS, (rank - 1) % RANKS
    (received,) = transport.irecv([_message(source, rank)])
    number = torch.full((3,), float(rank), device=device)
    (sent,) = transport.isend([_message(rank, target)], [number])
    if received.wait().tolist() != [float(source)] * 3:
        raise RuntimeError(f"rank {rank}: the message of rank {source} arrived damaged")
    sent.wait()


def _message(source: int, target: int) -> Message:
    return Message(
        source=parse_op("language0.F0"),
        target=parse_op("language1.F0"),
        source_rank=source,
        target_rank=target,
        sequence=0,
        shape=(3,),
        dtype="float32",
    )


def cases(size: Size) -> dict[str, Case]:
    """The models, two chunks of the language model per rank."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    options = dataclasses.replace(
        OPTIONS, params_dtype=dtype, max_sequence_length=8192, image_size=size.pixels
    )

    def wide(spec: Any) -> Any:
        modules = tuple(
            dataclasses.replace(
                one,
                hidden_size=size.width,
                ffn_hidden_size=4 * size.width,
                attention_heads=size.heads,
                kv_groups=size.heads,
                **({"output_size": size.width} if one.output_size else {}),
            )
            for one in spec.modules
        )
        return dataclasses.replace(spec, modules=modules)

    common: dict[str, Any] = {
        "options": options,
        "images_per_pass": IMAGES_PER_PASS,
        "deterministic": False,
        "describe": partial(described, size.patches),
    }
    return {
        "text": Case(
            spec=wide(language_only(layers=8)), layout=cut(RANKS, language=[1] * 8), **common
        ),
        "images": Case(
            spec=wide(vision_language(vision_layers=4, language_layers=8)),
            layout=cut(RANKS, vision=[1] * 4, language=[1] * 8),
            **common,
        ),
    }


def described(patches: int, microbatch: Microbatch) -> MicrobatchMetadata:
    """Metadata off the tensors' shapes."""
    samples, length = microbatch["tokens"].shape
    images = (Item(units=patches, tokens=patches),) * len(microbatch["images"])
    return MicrobatchMetadata(
        sequence_length=length, samples=samples, items={"vision": images} if images else {}
    )


def draw(
    kind: str, size: Size, count: int, seed: int, dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """A batch; with images, each microbatch has its own number of them, in front of its text."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        images = source.choice([0, 1, 3, 8, 20]) if kind == "images" else 0
        random_numbers = torch.Generator().manual_seed(source.randrange(10**6))
        text = torch.randint(0, VOCABULARY, (size.text,), generator=random_numbers)
        tokens = torch.cat([torch.full((images * size.patches,), IMAGE), text])[None]
        pixels = torch.randn(images, 3, size.pixels, size.pixels, generator=random_numbers)
        one = {
            "tokens": tokens,
            "labels": torch.randint(0, VOCABULARY, tokens.shape, generator=random_numbers),
            "loss_mask": (tokens != IMAGE).to(dtype),
            "images": pixels.to(dtype),
        }
        made.append({name: tensor.cuda() for name, tensor in one.items()})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--search-ms", type=int, default=1000, help="search of a plan, ahead")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(
        size=args.size,
        repeats=args.repeats,
        microbatches=args.microbatches,
        search_ns=args.search_ms * 1_000_000,
    )
    rows = run_on_ranks(
        work,
        RANKS,
        run,
        deadline_s=500.0,
        initialise=False,
        environment={"TORCHDYNAMO_DISABLE": "1"},
    )[0]
    write_rows(args.output, "batches", SYSTEMS, rows)
    told_medians(SYSTEMS, rows, _log)


if __name__ == "__main__":
    main()
