import pytest

from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.semu.memory import (
    OptimizerOptions,
    activation_capacity_bytes,
    module_parameters,
    rank_parameters,
    rank_state_bytes,
)
from megatron_pipeweaver.semu.options import RunOptions

VISION = ModuleSpec(
    name="vision",
    kind=ModuleKind.VISION,
    layers=3,
    hidden_size=32,
    ffn_hidden_size=64,
    attention_heads=4,
    kv_groups=4,
    frozen=True,
    patch_size=2,
    patches_per_token=4,
    output_size=64,
    projector_hidden_size=48,
)
LANGUAGE = ModuleSpec(
    name="language",
    kind=ModuleKind.LANGUAGE,
    layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    attention_heads=4,
    kv_groups=2,
    gated_mlp=True,
    after=("vision",),
    vocab_size=100,
)
MODEL = ModelSpec(name="small", modules=(VISION, LANGUAGE))
LAYOUT = ChunkLayout(
    pipeline_size=2,
    modules=(
        ModuleLayout(module="vision", segments=1, layers=(2, 1)),
        ModuleLayout(module="language", segments=1, layers=(1, 1)),
    ),
)


def test_parameters_by_hand() -> None:
    layer = 2 * 2 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32)
    patches = 12 * 32 + 32
    projector = (128 * 48 + 48) + (48 * 64 + 64)
    assert module_parameters(VISION) == 3 * layer + patches + 2 * 32 + projector
    llama = 2 * 64 + 64 * (64 + 2 * 32) + 64 * 64 + 64 * 2 * 96 + 96 * 64
    assert module_parameters(LANGUAGE) == 2 * llama + 64 + 2 * 100 * 64


def test_ranks_share_all_parameters() -> None:
    ranks = rank_parameters(MODEL, LAYOUT, RunOptions())
    assert sum(ranks) == module_parameters(VISION) + module_parameters(LANGUAGE)


def test_tensor_parallel_ranks_hold_less() -> None:
    options = RunOptions(parallel=ParallelSizes(pipeline=1, tensor=2))
    half = module_parameters(LANGUAGE, options)
    assert module_parameters(LANGUAGE) / 2 < half < module_parameters(LANGUAGE) * 0.52


def test_frozen_modules_have_weights_alone_and_state_is_spread() -> None:
    alone = ModelSpec(name="alone", modules=(VISION,))
    layout = ChunkLayout(pipeline_size=2, modules=LAYOUT.modules[:1])
    options = RunOptions()
    assert sum(rank_state_bytes(alone, layout, options)) == 2 * module_parameters(VISION)
    backbone = ModelSpec(name="text", modules=(ModuleSpec(**_without_after(LANGUAGE)),))
    layout = ChunkLayout(pipeline_size=2, modules=LAYOUT.modules[1:])
    count = module_parameters(LANGUAGE)
    assert sum(rank_state_bytes(backbone, layout, options)) == 18 * count
    options = RunOptions(parallel=ParallelSizes(pipeline=2, data=4))
    spread = sum(rank_state_bytes(backbone, layout, options))
    assert spread == pytest.approx(9 * count, abs=4)
    whole = OptimizerOptions(distributed=False)
    assert sum(rank_state_bytes(backbone, layout, options, whole)) == 18 * count


def _without_after(module: ModuleSpec) -> dict[str, object]:
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__}
    return {**fields, "after": ()}


def test_capacity_is_what_is_left() -> None:
    assert activation_capacity_bytes(100, (60, 70), 10) == (30, 20)


def test_states_that_do_not_fit_name_the_rank() -> None:
    with pytest.raises(InfeasibleError, match=r"rank 1: .* 95 of 100 bytes"):
        activation_capacity_bytes(100, (60, 95), 10)
