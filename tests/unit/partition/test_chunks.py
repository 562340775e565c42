import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleKind, ModuleSpec
from megatron_pipeweaver.partition.chunks import (
    choose_segments,
    choose_sub_microbatch,
    cut_as_given,
    cut_layers,
    make_layout,
    segment_limits,
)


def _module(name: str, layers: int, **more: object) -> ModuleSpec:
    return ModuleSpec(
        name=name,
        kind=ModuleKind.VISION if name == "vision" else ModuleKind.LANGUAGE,
        layers=layers,
        hidden_size=64,
        ffn_hidden_size=128,
        attention_heads=4,
        kv_groups=4,
        **more,  # type: ignore[arg-type]
    )


MODEL = ModelSpec(
    name="small",
    modules=(_module("vision", 10), _module("language", 3, after=("vision",))),
)


def test_sub_microbatch_is_the_smallest_that_reaches_95_percent() -> None:
    # items per ns: 0.010, 0.0182, 0.0200, 0.0205 (best), 0.0200; 95 % of the best is 0.0195
    times = {1: 100, 2: 110, 4: 200, 8: 390, 16: 800}
    assert choose_sub_microbatch(times) == 4


def test_exactly_95_percent_is_enough() -> None:
    assert choose_sub_microbatch({1: 100, 19: 1900, 20: 1900}) == 1
    assert choose_sub_microbatch({1: 101, 20: 1900}) == 20


@pytest.mark.parametrize("times", [{}, {0: 5}, {1: 0}])
def test_profile_that_says_nothing_is_refused(times: dict[int, int]) -> None:
    with pytest.raises(ConfigError, match="at least one size"):
        choose_sub_microbatch(times)


def test_segments_are_rounded_down_ratios() -> None:
    assert choose_segments({"vision": 100, "language": 299}) == {"vision": 1, "language": 2}
    assert choose_segments({"language": 500, "vision": 100}) == {"language": 5, "vision": 1}


def test_segments_stay_below_their_limits() -> None:
    assert choose_segments({"vision": 1000, "language": 100}, {"vision": 2}) == {
        "vision": 2,
        "language": 1,
    }


@pytest.mark.parametrize("times", [{}, {"vision": 0}])
def test_segments_need_times(times: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="every module a time"):
        choose_segments(times)


def test_limits_leave_a_layer_in_every_chunk() -> None:
    assert segment_limits(MODEL, 2) == {"vision": 5, "language": 1}
    assert segment_limits(MODEL, 16) == {"vision": 1, "language": 1}


def test_cut_is_even_and_longer_stages_come_first() -> None:
    assert cut_layers(63, 4) == (16, 16, 16, 15)
    assert cut_layers(3, 5) == (1, 1, 1, 0, 0)
    assert cut_layers(0, 2) == (0, 0)


@pytest.mark.parametrize(("layers", "stages"), [(-1, 2), (3, 0)])
def test_cut_refuses_what_cannot_be(layers: int, stages: int) -> None:
    with pytest.raises(ConfigError, match="into"):
        cut_layers(layers, stages)


def test_layout_has_every_module_in_order() -> None:
    layout = make_layout(MODEL, 2, {"vision": 3})
    assert [(one.module, one.segments, one.layers) for one in layout.modules] == [
        ("vision", 3, (2, 2, 2, 2, 1, 1)),
        ("language", 1, (2, 1)),
    ]
    assert layout.virtual_size == 4


def test_more_ranks_than_layers_leave_empty_chunks() -> None:
    assert make_layout(MODEL, 4, {}).modules[1].layers == (1, 1, 1, 0)


def test_segments_that_cannot_be_cut_name_the_choice() -> None:
    with pytest.raises(
        ConfigError, match=r"'language' has 3 layers.*4 pipeline ranks.*2 segm.*1 to 1"
    ):
        make_layout(MODEL, 4, {"language": 2})
    with pytest.raises(ConfigError, match="choose 1 to 5"):
        make_layout(MODEL, 2, {"vision": 0})


def test_segments_of_an_unknown_module_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no module \['audio'\]"):
        make_layout(MODEL, 2, {"audio": 1})


def test_given_layers_take_the_place_of_a_modules_cut() -> None:
    even = make_layout(MODEL, 2, {"vision": 2})
    found = cut_as_given(even, MODEL, {"vision": (1, 2, 1, 2, 3, 1)})
    assert [(one.segments, one.layers) for one in found.modules] == [
        (3, (1, 2, 1, 2, 3, 1)),
        (1, (2, 1)),
    ]
    assert cut_as_given(even, MODEL, {}) == even


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4, 3, 3), "3 stages on 2 pipeline ranks"),
        ((), "0 stages on 2 pipeline ranks"),
        ((5, 6), "11 in 2 stages; it has 10"),
        ((5, 0, 3, 2), "a stage without any, and 2 segments"),
    ],
)
def test_given_layers_that_are_no_cut_are_refused(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"layers of module 'vision': {message}"):
        cut_as_given(make_layout(MODEL, 2, {}), MODEL, {"vision": layers})
