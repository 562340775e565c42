import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import (
    Dependency,
    Microbatch,
    OpKey,
    OpKind,
    Pass,
    PassGraph,
    PassKey,
    PassNode,
    Problem,
    Strategy,
    dependencies,
)
from tests.unit.ir.examples import problem, stages, strategy


def node(module, after=(), frozen=False, stages=2, latency=3):
    return PassNode(
        key=PassKey(0, module, 0),
        stages=stages,
        after=tuple(PassKey(0, name, 0) for name in after),
        frozen=frozen,
        p2p_latency_ns=latency,
    )


def op(kind, module, stage, sub_microbatch=0):
    return OpKey(OpKind(kind), 0, module, sub_microbatch, stage)


GRAPH = problem().graph


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (op("F", "vision", 0), []),
        (op("F", "vision", 2), [Dependency(op("F", "vision", 1), 5, True)]),
        (
            op("F", "language", 0),
            [  # the vision passes end on rank 1, language begins on rank 0: vision's latency
                Dependency(op("F", "vision", 3, 0), 5, True),
                Dependency(op("F", "vision", 3, 1), 5, True),
            ],
        ),
        (op("B", "language", 1), [Dependency(op("F", "language", 1), 0, False)]),
        (
            op("B", "language", 0),
            [
                Dependency(op("F", "language", 0), 0, False),
                Dependency(op("B", "language", 1), 3, True),
            ],
        ),
        (
            op("B", "vision", 3, 1),
            [
                Dependency(op("F", "vision", 3, 1), 0, False),
                Dependency(op("B", "language", 0), 5, True),
            ],
        ),
        (op("W", "vision", 3), [Dependency(op("B", "vision", 3), 0, False)]),
    ],
    ids=str,
)
def test_who_waits_for_whom(waiting, expected):
    assert list(dependencies(GRAPH, waiting)) == expected


def test_one_rank_has_no_latency():
    graph = PassGraph(1, [node("a", stages=2), node("b", after=["a"], stages=1)])
    assert dependencies(graph, op("F", "a", 1)) == (Dependency(op("F", "a", 0), 0, True),)
    assert dependencies(graph, op("F", "b", 0)) == (Dependency(op("F", "a", 1), 0, True),)
    assert dependencies(graph, op("B", "a", 1))[1] == Dependency(op("B", "b", 0), 0, True)


def test_nothing_waits_for_the_backward_of_a_frozen_pass():
    graph = PassGraph(2, [node("a"), node("b", after=["a"], frozen=True)])
    assert dependencies(graph, op("B", "a", 1)) == (Dependency(op("F", "a", 1), 0, False),)
    assert not [one for one in graph.ops(split=True) if one.module == "b" and one.kind != "F"]


def test_ops_stand_once_each():
    ops = list(GRAPH.ops())
    assert len(ops) == len(set(ops)) == 2 * (4 + 4 + 2 + 2)
    assert len(list(GRAPH.ops(split=True))) == 3 * (4 + 4 + 2 + 2)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("a"), node("a")], "pass 'a' sub-microbatch 0 stands twice"),
        ([node("a", after=["b"])], "comes after microbatch 0, pass 'b'"),
        ([node("a", after=["a"])], "waits for itself"),
        ([node("a", after=["b"]), node("b", after=["a"])], "waits for itself"),
    ],
)
def test_graph_refuses(nodes, message):
    with pytest.raises(ConfigError, match=message):
        PassGraph(2, nodes)


def language(**changes):
    fields = {"module": "language", "sub_microbatch": 0, "stages": stages(2)} | changes
    return Pass(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sub_microbatch": -1}, "sub-microbatch index must be >= 0"),
        ({"p2p_latency_ns": -3}, "p2p_latency_ns is -3"),
        ({"stages": ((strategy(),), ())}, "stage 1: no strategy"),
        ({"stages": ((strategy(), strategy()),)}, r"stage 0: strategy names repeat"),
    ],
)
def test_pass_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        language(**changes)


@pytest.mark.parametrize("field", ["forward_ns", "backward_ns", "weight_grad_ns", "memory_bytes"])
def test_strategy_refuses_negative_numbers(field):
    fields = {"forward_ns": 0, "backward_ns": 0, "weight_grad_ns": 0, "memory_bytes": 0}
    with pytest.raises(ConfigError, match=f"strategy 'keep': {field} is -1; it must be >= 0"):
        Strategy(name="keep", **(fields | {field: -1}))


def test_strategy_refuses_an_empty_name():
    with pytest.raises(ConfigError, match="give every strategy a name"):
        Strategy(name="", forward_ns=0, backward_ns=0, weight_grad_ns=0, memory_bytes=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_size": 0}, "pipeline_size is 0"),
        ({"memory_capacity_bytes": (1,)}, "1 entries for 2 ranks"),
        ({"memory_capacity_bytes": (1, -1)}, "holds a negative number"),
        ({"modules": {"language": 0}}, "has 0 segments"),
        ({"modules": {"": 1}}, "module ''"),
        ({"modules": {"other": 1}}, "no such module"),
        ({"modules": {"language": 2}}, "has 2 stages; 2 ranks x 2 segments make 4"),
    ],
)
def test_problem_refuses(changes, message):
    fields = {
        "pipeline_size": 2,
        "memory_capacity_bytes": (1, 1),
        "modules": {"language": 1},
        "microbatches": (Microbatch(passes=(language(),)),),
    }
    with pytest.raises(ConfigError, match=message):
        Problem(**(fields | changes))


def test_strategy_of_an_op():
    wanted = OpKey(OpKind.B, 0, "vision", 1, 2)
    assert problem().strategy(wanted, "recompute") == stages(1)[0][1]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "offload"),
        ({"microbatch": 2}, "keep"),
        ({"microbatch": -1}, "keep"),
        ({"module": "audio"}, "keep"),
        ({"sub_microbatch": 2}, "keep"),
        ({"stage": 4}, "keep"),
        ({"stage": -1}, "keep"),
    ],
)
def test_strategy_of_an_unknown_op_is_a_key_error(changes, name):
    key = OpKey(OpKind.B, 0, "vision", 1, 2)._replace(**changes)
    with pytest.raises(KeyError):
        problem().strategy(key, name)


def test_passes_come_with_their_keys_in_file_order():
    assert [key for key, _ in problem().passes()] == [
        PassKey(0, "vision", 0),
        PassKey(0, "vision", 1),
        PassKey(0, "language", 0),
        PassKey(1, "language", 0),
    ]
