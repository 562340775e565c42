import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkLayout, ModuleLayout, layers_text

VISION = ModuleLayout(module="vision", segments=2, layers=(1, 2, 0, 3))
LANGUAGE = ModuleLayout(module="language", segments=1, layers=(4, 3))
LAYOUT = ChunkLayout(pipeline_size=2, modules=(VISION, LANGUAGE))


def test_chunks_of_a_rank_are_all_modules_segments_in_order():
    first, second, third = LAYOUT.chunks_of_rank(1)
    assert [one.virtual_stage for one in (first, second, third)] == [0, 1, 2]
    assert (first.module, first.segment, first.stage) == ("vision", 0, 1)
    assert (first.first_layer, first.layers, first.is_first, first.is_last) == (1, 2, False, False)
    assert (second.segment, second.stage, second.first_layer, second.layers) == (1, 3, 3, 3)
    assert second.is_last
    assert (third.module, third.first_layer, third.layers) == ("language", 4, 3)
    assert LAYOUT.chunks_of_rank(0)[0].is_first


def test_chunks_cover_every_layer_once():
    chunks = [chunk for rank in range(2) for chunk in LAYOUT.chunks_of_rank(rank)]
    for module in LAYOUT.modules:
        layers = [
            chunk.first_layer + index
            for chunk in sorted(chunks, key=lambda chunk: chunk.stage)
            if chunk.module == module.module
            for index in range(chunk.layers)
        ]
        assert layers == list(range(sum(module.layers)))


def test_virtual_stage_is_the_place_in_the_chunk_list():
    assert LAYOUT.virtual_size == 3
    for rank in range(2):
        for chunk in LAYOUT.chunks_of_rank(rank):
            assert LAYOUT.virtual_stage(chunk.module, chunk.stage) == chunk.virtual_stage


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModuleLayout(module="v", segments=0, layers=(1,)), "do not make 0 segments"),
        (lambda: ModuleLayout(module="v", segments=1, layers=()), "0 stages do not make 1"),
        (lambda: ModuleLayout(module="v", segments=2, layers=(1, 1, 1)), "3 stages do not make 2"),
        (lambda: ModuleLayout(module="v", segments=1, layers=(1, -1)), "fewer than 0 layers"),
        (lambda: ChunkLayout(pipeline_size=2, modules=()), "at least one rank and one module"),
        (lambda: ChunkLayout(pipeline_size=0, modules=(VISION,)), "at least one rank"),
        (
            lambda: ChunkLayout(pipeline_size=4, modules=(VISION,)),
            "'vision': 4 stages; 4 ranks x 2 segments make 8",
        ),
        (
            lambda: ChunkLayout(pipeline_size=2, modules=(VISION, VISION)),
            "names repeat: .*; name each module once",
        ),
        (lambda: LAYOUT.chunks_of_rank(2), "rank 2 is not one of 2 pipeline ranks"),
        (lambda: LAYOUT.chunks_of_rank(-1), "rank -1 is not one of 2"),
        (lambda: LAYOUT.virtual_stage("vision", 4), "'vision': no stage 4; it has 4"),
        (lambda: LAYOUT.virtual_stage("vision", -1), "no stage -1"),
        (lambda: LAYOUT.virtual_stage("audio", 0), "has no module 'audio'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_layouts_text_has_every_modules_layers() -> None:
    layout = ChunkLayout(pipeline_size=2, modules=(VISION, LANGUAGE))
    assert layers_text(layout) == "vision=1:2:0:3,language=4:3"
