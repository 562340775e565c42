import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.partition.offline import partition_model
from megatron_pipeweaver.semu.interface import Load, StageShape


class FakeCosts:
    """A layer takes 100 ns to start and 10 ns an item; LM layers take 2,000 ns."""

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        layer_ns = 2_000 if module.name == "language" else 100 + 10 * len(load.lengths)
        return (
            Strategy(
                name="keep",
                forward_ns=stage.layers * layer_ns,
                backward_ns=0,
                weight_grad_ns=0,
                memory_bytes=1,
            ),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return 0


def model(vision_layers: int = 4) -> ModelSpec:
    shared = {"hidden_size": 8, "ffn_hidden_size": 8, "attention_heads": 1, "kv_groups": 1}
    return ModelSpec(
        name="toy",
        modules=(
            ModuleSpec(name="vision", kind=ModuleKind.VISION, layers=vision_layers, **shared),
            ModuleSpec(
                name="language", kind=ModuleKind.LANGUAGE, layers=8, after=("vision",), **shared
            ),
        ),
    )


def typical(images: int) -> MicrobatchMetadata:
    return MicrobatchMetadata(
        sequence_length=64, items={"vision": (Item(units=16, tokens=4),) * images}
    )


def test_the_sub_microbatch_is_the_smallest_at_95_percent_of_the_best_efficiency() -> None:
    # items/ns at n: n / (100 + 10 n); best of 1..100 is 100/1100, 95 % of it needs n >= 64
    chosen = partition_model(model(), 2, FakeCosts(), typical(100))
    assert chosen.sub_microbatch == {"vision": 64}


def test_segments_follow_the_module_times_and_the_layers_there_are() -> None:
    chosen = partition_model(model(), 2, FakeCosts(), typical(4))
    # vision: 4 layers x 140 ns; language: 8 x 2,000 ns, so K = 28, but 2 ranks can cut 8 in 4
    assert chosen.module_times_ns == {"vision": 560, "language": 16_000}
    assert {one.module: one.segments for one in chosen.layout.modules} == {
        "vision": 1,
        "language": 4,
    }


def test_what_the_user_fixes_stays() -> None:
    chosen = partition_model(
        model(),
        2,
        FakeCosts(),
        typical(100),
        sub_microbatch={"vision": 7},
        segments={"language": 2},
    )
    assert chosen.sub_microbatch == {"vision": 7}
    assert [one.segments for one in chosen.layout.modules] == [1, 2]


def test_a_segment_count_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot cut"):
        partition_model(model(), 2, FakeCosts(), typical(4), segments={"vision": 5})


def test_a_module_without_a_typical_item_is_refused() -> None:
    with pytest.raises(ConfigError, match="no item of module 'vision'"):
        partition_model(model(), 2, FakeCosts(), typical(0))
