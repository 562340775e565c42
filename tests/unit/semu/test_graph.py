import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.graph import (
    Device,
    Graph,
    Memory,
    MemoryStep,
    OperatorNode,
    Store,
    TensorNode,
    emulate,
)
from megatron_pipeweaver.semu.work import Queue

COMPUTE = Device(0, Queue.COMPUTE)
LINK = Device(0, Queue.TENSOR_LINK)
MEMORY = Memory(0, Store.DEVICE)
HOST = Memory(0, Store.HOST)


def _tensor(name: str, size: int = 10, memory: Memory = MEMORY) -> TensorNode:
    return TensorNode(name, size, memory)


def test_queues_run_side_by_side_and_wait_for_data() -> None:
    #  compute | matmul 0-10 | other 10-14 |  wait   | use 17-19
    #  link    |             | reduce 10-17 |
    graph = Graph(
        operators=(
            OperatorNode("matmul", COMPUTE, 10, (), (0,)),
            OperatorNode("reduce", LINK, 7, (0,), (1,)),
            OperatorNode("other", COMPUTE, 4),
            OperatorNode("use", COMPUTE, 2, (1,), (2,)),
        ),
        tensors=(_tensor("a"), _tensor("b"), _tensor("c")),
    )
    timeline = emulate(graph)
    assert timeline.starts_ns == (0, 10, 10, 17)
    assert timeline.ends_ns == (10, 17, 14, 19)
    assert timeline.duration_ns == 19
    assert timeline.lifetimes == ((0, 17), (10, 19), (17, 19))


def test_memory_counts_what_lives_at_once() -> None:
    graph = Graph(
        operators=(
            OperatorNode("first", COMPUTE, 5, (), (0,)),
            OperatorNode("second", COMPUTE, 5, (0,), (1,)),
            OperatorNode("third", COMPUTE, 5, (1,), (2,)),
        ),
        tensors=(_tensor("a", 100), _tensor("b", 20), _tensor("c", 3)),
    )
    timeline = emulate(graph)
    assert timeline.memory[MEMORY] == (
        MemoryStep(0, 100),
        MemoryStep(5, 120),
        MemoryStep(10, 23),
        MemoryStep(15, 0),
    )
    assert timeline.peak_bytes(MEMORY) == 120
    assert timeline.peak_bytes(HOST) == 0


def test_given_tensors_live_from_the_beginning_and_pinned_ones_to_the_end() -> None:
    graph = Graph(
        operators=(
            OperatorNode("idle", COMPUTE, 5),
            OperatorNode("read", COMPUTE, 5, (0,)),
            OperatorNode("idle", COMPUTE, 5),
        ),
        tensors=(_tensor("given"), TensorNode("kept", 1, MEMORY, True), _tensor("unused")),
    )
    assert emulate(graph).lifetimes == ((0, 10), (0, 15), None)


def test_writing_in_place_waits_for_readers() -> None:
    graph = Graph(
        operators=(
            OperatorNode("write", COMPUTE, 1, (), (0,)),
            OperatorNode("send", LINK, 9, (0,), ()),
            OperatorNode("overwrite", COMPUTE, 1, (), (0,)),
        ),
        tensors=(_tensor("a"),),
    )
    assert emulate(graph).starts_ns == (0, 1, 10)


def test_order_without_data_is_kept() -> None:
    graph = Graph(
        operators=(
            OperatorNode("copy", LINK, 9),
            OperatorNode("after", COMPUTE, 1, (), (), (0,)),
        ),
        tensors=(),
    )
    assert emulate(graph).starts_ns == (0, 9)


def test_nothing_takes_no_time() -> None:
    assert emulate(Graph(operators=(), tensors=())).duration_ns == 0


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (OperatorNode("a", COMPUTE, -1), "below 0"),
        (OperatorNode("a", COMPUTE, 1, (), (), (0,)), "in front of node 0"),
        (OperatorNode("a", COMPUTE, 1, (3,)), "no such tensor"),
    ],
)
def test_broken_graphs_are_refused(node: OperatorNode, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Graph(operators=(node,), tensors=())
