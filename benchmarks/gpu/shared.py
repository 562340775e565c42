r"""Four ranks on one GPU: PipeWeaver beside Megatron's interleaved function, measured.

    bash scripts/gpu_check.sh            # starts MPS and sets NCCL's multi-rank switch
    python -m benchmarks.gpu.shared --size small -o shared.csv     # on a CPU: that it runs at all

First every link of the pipeline carries a message, which tells in seconds whether NCCL takes ranks
that share a device. Then a language model of real chunks trains by both schedule functions by
turns; Megatron's function takes microbatches of one length, so text is what both can run. The same
batches with images, ever another number of them, follow by PipeWeaver alone. Plans come from a
planner in the training process and from made-up costs, so PipeWeaver's times hold its search and
schedules that know nothing of the GPU: more than it needs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import random
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.text import parse_op
from megatron_pipeweaver.runtime.transfer import ProcessGroupTransport
from tests.distributed.harness import RankContext, run_on_ranks
from tests.distributed.training import Case, Trainer, installed, megatron_ranks, schedule_for
from tests.unit.models.examples import (
    OPTIONS,
    batch,
    cut,
    language_only,
    vision_language,
)

_log = logging.getLogger("shared")

RANKS = 4
WIDTHS = {"small": (8, 2, 4), "large": (2048, 16, 512)}
"""Hidden size, attention heads, text tokens of a sample."""


def work(ctx: RankContext, size: str, repeats: int, microbatches: int) -> Any:
    """Rank 0's rows: (batch kind, repeat, system, nanoseconds)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{ctx.directory / 'rendezvous'}",
        rank=ctx.rank,
        world_size=ctx.size,
    )
    ctx.note("a message over every link")
    check_links(ctx.rank, device)
    rows = []
    for kind, case in cases(size).items():
        with megatron_ranks(RANKS, case.layout.virtual_size) as groups:
            trainer = Trainer(case, groups)
            config = trainer.model[0].config
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False
            config.deallocate_pipeline_outputs = on_gpu  # gloo may still be sending them
            schedule = schedule_for(case, seed=0)
            for repeat in range(repeats):
                data = draw(kind, size, microbatches, repeat, case.options.params_dtype)
                with installed(schedule):
                    ctx.note(f"{kind} {repeat}: PipeWeaver")
                    rows.append((kind, repeat, "pipeweaver", step_ns(trainer, data)))
                if kind == "text":
                    ctx.note(f"{kind} {repeat}: Megatron")
                    rows.append((kind, repeat, "megatron", step_ns(trainer, data)))
    return rows


def check_links(rank: int, device: torch.device) -> None:
    """Every rank sends its number to the next one."""
    transport = ProcessGroupTransport([range(RANKS)], device=device, timeout=timedelta(seconds=60))
    target, source = (rank + 1) % RANKS, (rank - 1) % RANKS
    (received,) = transport.irecv([_message(source, rank)])
    (sent,) = transport.isend(
        [_message(rank, target)], [torch.full((3,), float(rank), device=device)]
    )
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


def cases(size: str) -> dict[str, Case]:
    """The models, two chunks of the language model per rank."""
    width, heads, _ = WIDTHS[size]
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    options = dataclasses.replace(OPTIONS, params_dtype=dtype, max_sequence_length=4096)

    def wide(spec: Any) -> Any:
        modules = tuple(
            dataclasses.replace(
                one,
                hidden_size=width,
                ffn_hidden_size=4 * width,
                attention_heads=heads,
                kv_groups=heads,
                **({"output_size": width} if one.output_size else {}),
            )
            for one in spec.modules
        )
        return dataclasses.replace(spec, modules=modules)

    return {
        "text": Case(
            spec=wide(language_only(layers=8)),
            layout=cut(RANKS, language=[1] * 8),
            options=options,
            deterministic=False,
        ),
        "images": Case(
            spec=wide(vision_language(vision_layers=4, language_layers=8)),
            layout=cut(RANKS, vision=[1] * 4, language=[1] * 8),
            options=options,
            deterministic=False,
        ),
    }


def draw(kind: str, size: str, count: int, seed: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A batch; with images, each microbatch has its own number of them."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        images = source.choice([0, 1, 3, 8, 20]) if kind == "images" else 0
        one = batch(images, text=WIDTHS[size][2], seed=source.randrange(10**6))
        made.append(
            {
                name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cuda()
                for name, tensor in one.items()
            }
        )
    return made


def step_ns(trainer: Trainer, data: list[dict[str, Any]]) -> int:
    """One iteration, from a barrier to the device's last work."""
    dist.barrier()
    torch.cuda.synchronize()
    started_ns = time.perf_counter_ns()
    trainer.step(data)
    torch.cuda.synchronize()
    return time.perf_counter_ns() - started_ns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=WIDTHS, default="large")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = run_on_ranks(
        work,
        RANKS,
        args.size,
        args.repeats,
        args.microbatches,
        deadline_s=500.0,
        initialise=False,
        environment={"TORCHDYNAMO_DISABLE": "1"},
    )[0]
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["batches", "repeat", "system", "milliseconds"])
        writer.writerows((*row[:3], f"{row[3] / 1e6:.3f}") for row in rows)
    for kind, system in dict.fromkeys((row[0], row[2]) for row in rows):
        times = [row[3] for row in rows if (row[0], row[2]) == (kind, system)]
        _log.info("%s, %s: %.2f ms (median of %d)", kind, system, median(times) / 1e6, len(times))


if __name__ == "__main__":
    main()
