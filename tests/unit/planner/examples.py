"""Models, cuts, costs and batches for the planner; nothing here needs torch."""

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.plan import ComputeAction
from megatron_pipeweaver.ir.problem import OpKey, Strategy
from megatron_pipeweaver.ir.trace import TIME_CODE, ActionTimes
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.planner.settings import CostSettings, PlannerSettings
from megatron_pipeweaver.planner.source import PlanAnswer, RanPlan
from megatron_pipeweaver.planner.wire import decode
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.options import RunOptions

IMAGE = Item(units=16, tokens=4)


def vision_language(*, frozen: bool = False) -> ModelSpec:
    vision = ModuleSpec(
        name="vision",
        kind=ModuleKind.VISION,
        layers=4,
        hidden_size=8,
        ffn_hidden_size=16,
        attention_heads=2,
        kv_groups=2,
        frozen=frozen,
        output_size=12,
    )
    language = ModuleSpec(
        name="language",
        kind=ModuleKind.LANGUAGE,
        layers=6,
        hidden_size=12,
        ffn_hidden_size=24,
        attention_heads=2,
        kv_groups=2,
        after=("vision",),
        vocab_size=32,
    )
    return ModelSpec(name="small", modules=(vision, language))


def even_cut(model: ModelSpec, pipeline_size: int, **segments: int) -> ChunkLayout:
    """Layers as evenly as they go, the first stages one more; one segment where none is given."""
    modules = []
    for module in model.modules:
        stages = pipeline_size * segments.get(module.name, 1)
        least, more = divmod(module.layers, stages)
        layers = tuple(least + (stage < more) for stage in range(stages))
        modules.append(
            ModuleLayout(module=module.name, segments=segments.get(module.name, 1), layers=layers)
        )
    return ChunkLayout(pipeline_size=pipeline_size, modules=tuple(modules))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededCosts:
    """Random times that depend on the stage and its load alone; a `CostModel`."""

    seed: int = 0

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        rng = random.Random(repr((self.seed, module.name, stage, load.sequence, load.batch)))
        forward_ns = rng.randint(1, 100)
        gradient_ns = 0 if module.frozen else rng.randint(0, 50)
        backward_ns = rng.randint(1, 150)
        return (
            Strategy(
                name="keep",
                forward_ns=forward_ns,
                backward_ns=backward_ns,
                weight_grad_ns=gradient_ns,
                memory_bytes=rng.randint(50, 100),
            ),
            Strategy(
                name="recompute",
                forward_ns=forward_ns,
                backward_ns=backward_ns + forward_ns,
                weight_grad_ns=gradient_ns,
                memory_bytes=rng.randint(1, 50),
            ),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return size_bytes // 64


QUICK = SearchConfig(
    time_budget_ns=2_000_000, max_rounds=3, deterministic=True, split_weight_grad=False
)


def make_planner(
    *,
    model: ModelSpec | None = None,
    pipeline_size: int = 2,
    segments: dict[str, int] | None = None,
    seed: int = 0,
    capacity: int = 10_000,
    search: SearchConfig = QUICK,
    **settings: Any,
) -> Planner:
    model = model or vision_language()
    return Planner(
        model=model,
        layout=even_cut(model, pipeline_size, **(segments or {})),
        costs=settings.pop("costs", SeededCosts(seed=seed)),
        sub_microbatch=settings.pop("sub_microbatch", {"vision": 2}),
        memory_capacity_bytes=(capacity,) * pipeline_size,
        dtypes=settings.pop("dtypes", {"vision": "bfloat16", "language": "bfloat16"}),
        search=search,
        **settings,
    )


def batch_of(*images: int, length: int = 32) -> BatchMetadata:
    """One microbatch for every number of images."""
    return BatchMetadata(
        microbatches=tuple(
            MicrobatchMetadata(
                sequence_length=length, items={"vision": (IMAGE,) * count} if count else {}
            )
            for count in images
        )
    )


def make_settings(*, capacity: int = 1 << 30, **search: Any) -> PlannerSettings:
    """Settings of a planner for `vision_language` on two ranks, by SEMU for a CPU."""
    model = vision_language()
    return PlannerSettings(
        model=model,
        layout=even_cut(model, 2),
        costs=CostSettings(device=load_device("cpu"), options=RunOptions.unfused()),
        sub_microbatch={"vision": 2},
        memory_capacity_bytes=(capacity,) * 2,
        dtypes={"vision": "float32", "language": "float32"},
        search=replace(QUICK, **search),
    )


def ran(answer: PlanAnswer, duration_ns: Callable[[OpKey], int]) -> RanPlan:
    """An iteration by `answer` in which every op took what `duration_ns` says."""
    verified = (answer.received or decode(answer.data)).plan
    ranks = verified.plan.ranks
    spans = (
        [(0, duration_ns(one.op) if isinstance(one, ComputeAction) else 7) for one in actions]
        for actions in ranks
    )
    count = len(ranks)
    times = ActionTimes(
        iteration=0,
        hosts=("here",) * count,
        offsets_ns=(0,) * count,
        spans=tuple(array(TIME_CODE, chain.from_iterable(one)).tobytes() for one in spans),
        busy_ns=(0,) * count,
        peak_bytes=(None,) * count,
    )
    return RanPlan(answer=answer, made=verified, own=verified, times=times)
