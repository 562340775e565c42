import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.ir.text import format_grid, format_op, format_ops, parse_grid, parse_op


@pytest.mark.parametrize(
    ("module", "sub", "printed"),
    [
        ("vision", 0, "vision2.F3"),
        ("vision", 1, "vision2.F3.1"),
        ("clip2", 0, "clip2:2.F3"),
        ("a:", 0, "a::2.F3"),
        ("vision encoder", 0, "vision%20encoder2.F3"),
        ("100%", 0, "100%25:2.F3"),
        ("x1.F2", 1, "x1.F2:2.F3.1"),
    ],
)
def test_ops_print_and_parse(module, sub, printed):
    op = OpKey(OpKind.F, 3, module, sub, 2)
    assert format_op(op) == printed
    assert parse_op(printed) == op


@pytest.mark.parametrize(
    "text", ["", "vision.F3", "vision0.X3", "vision0F3", "0.F3", "v0.F3.", f"v0.F{'9' * 5000}"]
)
def test_what_is_no_op_is_refused(text):
    with pytest.raises(ConfigError, match="is not an op; write it like vision0"):
        parse_op(text)


def test_grids_are_aligned_and_parse_back():
    rows = [["vision0.F0", "F"], [], ["B"]]
    text = format_grid(rows)
    assert text == "rank 0 | vision0.F0 F\nrank 1 |\nrank 2 | B"
    assert parse_grid("\n" + text + "\n\n") == rows


@pytest.mark.parametrize("text", ["rank 1 | a", "rank 0 a", "rank 0 | a\nrank 0 | b", "x"])
def test_grid_lines_begin_with_their_rank(text):
    with pytest.raises(ConfigError, match=r"it must begin with 'rank \d \|'"):
        parse_grid(text)


def test_op_orders_print_as_a_grid():
    op = OpKey(OpKind.B, 0, "language", 0, 1)
    assert format_ops([[op], []]) == "rank 0 | language1.B0\nrank 1 |"
