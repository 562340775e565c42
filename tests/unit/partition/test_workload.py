from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import LayerOptions, ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.ir.problem import PassKey, Strategy
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.partition.workload import Workload, make_workload
from megatron_pipeweaver.semu.interface import Load, StageShape

VISION = ModuleSpec(
    name="vision",
    kind=ModuleKind.VISION,
    layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    attention_heads=4,
    kv_groups=4,
    output_size=64,
)
LANGUAGE = ModuleSpec(
    name="language",
    kind=ModuleKind.LANGUAGE,
    layers=3,
    hidden_size=64,
    ffn_hidden_size=128,
    attention_heads=4,
    kv_groups=4,
    after=("vision",),
    vocab_size=100,
)
MODEL = ModelSpec(name="small", modules=(VISION, LANGUAGE))
IMAGE = Item(units=16, tokens=4)


class TokenCosts:
    """One nanosecond and one byte per token and layer; remembers what it was asked."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, Load]] = []

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        self.loads.append((module.name, load))
        time = load.tokens * stage.layers + stage.is_first + 2 * stage.is_last
        gradient = 0 if module.frozen else time
        return (
            Strategy(
                name="keep",
                forward_ns=time,
                backward_ns=time,
                weight_grad_ns=gradient,
                memory_bytes=10 * time,
            ),
            Strategy(
                name="recompute",
                forward_ns=time,
                backward_ns=2 * time,
                weight_grad_ns=gradient,
                memory_bytes=time,
            ),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return size_bytes


def _workload(
    *microbatches: MicrobatchMetadata,
    model: ModelSpec = MODEL,
    costs: TokenCosts | None = None,
    forward_only: bool = False,
    parallel: ParallelSizes | None = None,
) -> Workload:
    return make_workload(
        BatchMetadata(microbatches=microbatches),
        model,
        make_layout(model, 2, {"vision": 2}),
        {"vision": 2},
        costs or TokenCosts(),
        [1000, 2000],
        forward_only=forward_only,
        parallel=parallel,
    )


def _images(count: int, **more: object) -> MicrobatchMetadata:
    return MicrobatchMetadata(
        sequence_length=24,
        items={"vision": (IMAGE,) * count},
        **more,  # type: ignore[arg-type]
    )


def test_passes_follow_the_items() -> None:
    workload = _workload(_images(0), _images(3))
    assert [
        [(one.module, one.sub_microbatch, one.after) for one in microbatch.passes]
        for microbatch in workload.problem.microbatches
    ] == [
        [("language", 0, ())],
        [
            ("vision", 0, ()),
            ("vision", 1, ()),
            ("language", 0, (("vision", 0), ("vision", 1))),
        ],
    ]
    assert workload.problem.modules == {"vision": 2, "language": 1}
    assert workload.problem.memory_capacity_bytes == (1000, 2000)


def test_payloads_carry_ranges_and_shapes() -> None:
    payloads = _workload(_images(3)).payloads
    first = payloads[PassKey(0, "vision", 0)]
    assert (first.item_start, first.item_stop) == (0, 2)
    assert first.hidden_shape == (16, 2, 32)
    assert first.output_shape == (4, 2, 64)
    second = payloads[PassKey(0, "vision", 1)]
    assert (second.item_start, second.item_stop) == (2, 3)
    assert second.hidden_shape == (16, 1, 32)
    backbone = payloads[PassKey(0, "language", 0)]
    assert (backbone.item_start, backbone.item_stop) == (0, 1)
    assert backbone.hidden_shape == backbone.output_shape == (24, 1, 64)


def test_stages_know_their_layers_and_their_place() -> None:
    vision, language = _workload(_images(1)).problem.microbatches[0].passes
    assert [stage[0].forward_ns for stage in vision.stages] == [17, 16, 16, 18]
    assert [stage[0].forward_ns for stage in language.stages] == [49, 26]


def test_messages_are_as_large_as_the_hidden_tensor() -> None:
    vision, language = _workload(_images(2)).problem.microbatches[0].passes
    assert vision.p2p_latency_ns == 16 * 2 * 32 * 2
    assert language.p2p_latency_ns == 24 * 64 * 2


def test_unequal_items_are_packed_into_one_row() -> None:
    costs = TokenCosts()
    mixed = MicrobatchMetadata(
        sequence_length=24, items={"vision": (IMAGE, Item(units=36, tokens=9))}
    )
    payload = _workload(mixed, costs=costs).payloads[PassKey(0, "vision", 0)]
    assert payload.hidden_shape == (52, 1, 32)
    assert payload.output_shape == (13, 1, 64)
    load = next(load for name, load in costs.loads if name == "vision")
    assert (load.lengths, load.tokens, load.output_tokens) == ((16, 36), 52, 13)


def test_packed_documents_and_their_padding_are_lengths_of_their_own() -> None:
    costs = TokenCosts()
    _workload(_images(0, document_lengths=(10, 8)), costs=costs)
    assert costs.loads[0][1].lengths == (10, 8, 6)


def test_samples_stand_side_by_side() -> None:
    costs = TokenCosts()
    payloads = _workload(_images(0, samples=3), costs=costs).payloads
    assert payloads[PassKey(0, "language", 0)].hidden_shape == (24, 3, 64)
    assert costs.loads[0][1].lengths == (24, 24, 24)


def test_frozen_encoder_has_no_backward() -> None:
    model = replace(MODEL, modules=(replace(VISION, frozen=True), LANGUAGE))
    vision, language = _workload(_images(1), model=model).problem.microbatches[0].passes
    assert vision.frozen
    assert not language.frozen
    assert all(len(stage) == 1 for stage in vision.stages)
    assert all(stage[0].backward_ns == stage[0].weight_grad_ns == 0 for stage in vision.stages)


def test_frozen_backbone_hands_gradients_on_only_where_an_encoder_is_trained() -> None:
    model = replace(MODEL, modules=(VISION, replace(LANGUAGE, frozen=True)))
    text, image = _workload(_images(0), _images(1), model=model).problem.microbatches
    assert text.passes[0].frozen
    assert not image.passes[1].frozen
    assert image.passes[1].stages[0][0].backward_ns > 0
    assert image.passes[1].stages[0][0].weight_grad_ns == 0


def test_evaluation_has_forwards_alone() -> None:
    passes = _workload(_images(1), forward_only=True).problem.microbatches[0].passes
    assert all(one.frozen for one in passes)


def test_sequence_parallel_ranks_hand_on_their_share_of_the_backbones_sequence() -> None:
    parallel = ParallelSizes(pipeline=2, tensor=4, sequence_parallel=True)
    payloads = _workload(_images(1), parallel=parallel).payloads
    assert payloads[PassKey(0, "language", 0)].hidden_shape == (6, 1, 64)
    assert payloads[PassKey(0, "vision", 0)].hidden_shape == (16, 1, 32)
    assert payloads[PassKey(0, "vision", 0)].output_shape == (4, 1, 64)


def test_items_of_an_unknown_module_are_refused() -> None:
    strange = MicrobatchMetadata(sequence_length=24, items={"audio": (IMAGE,)})
    with pytest.raises(ConfigError, match=r"microbatch 0 has items of \['audio'\]"):
        _workload(strange)


def test_missing_sub_microbatch_size_is_refused() -> None:
    batch = BatchMetadata(microbatches=(_images(1),))
    with pytest.raises(ConfigError, match=r"no sub-microbatch size for \['vision'\]"):
        make_workload(batch, MODEL, make_layout(MODEL, 2, {}), {}, TokenCosts(), [1, 1])


def test_layout_of_another_model_is_refused() -> None:
    other = ModelSpec(name="other", modules=(replace(LANGUAGE, after=()),))
    batch = BatchMetadata(microbatches=(_images(1),))
    with pytest.raises(ConfigError, match="not those of model 'small'"):
        make_workload(batch, MODEL, make_layout(other, 2, {}), {"vision": 1}, TokenCosts(), [1, 1])


class CountingCosts(TokenCosts):
    """Remembers which stages it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[str, StageShape, Load]] = []

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        self.stages.append((module.name, stage, load))
        return super().stage_strategies(module, stage, load)


def test_equal_stages_of_equal_loads_are_asked_for_once() -> None:
    one = MicrobatchMetadata(sequence_length=16, items={"vision": (IMAGE,) * 4})
    costs = CountingCosts()
    made = _workload(one, one, one, costs=costs)
    assert len(costs.stages) == len(set(costs.stages))
    first, *others = (
        [found.stages for _, found in made.problem.passes() if found.module == name]
        for name in ("vision", "language")
    )
    for stages in (first, *others):
        assert len(stages) >= 3
        assert all(one is stages[0] for one in stages)


def test_stages_whose_layers_differ_are_asked_for_apart() -> None:
    windowed = replace(VISION, layers=4, layer=LayerOptions(window=4, full_attention_layers=(1,)))
    model = ModelSpec(name="windowed", modules=(windowed, LANGUAGE))
    costs = CountingCosts()
    layout = make_layout(model, 4, {})
    make_workload(
        BatchMetadata(
            microbatches=(MicrobatchMetadata(sequence_length=16, items={"vision": (IMAGE,)}),)
        ),
        model,
        layout,
        {"vision": 2},
        costs,
        (0,) * 4,
    )
    asked = {stage.first_layer for name, stage, _ in costs.stages if name == "vision"}
    assert asked == {0, 1, 2, 3}
