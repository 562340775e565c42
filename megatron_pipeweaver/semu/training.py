"""One subgraph's forward and backward as graphs of operator and tensor nodes.

The backward runs the operators in reverse: what was dropped is computed again where it is first
needed, then the input gradient, then the weight gradient, so that communication of the one hides
behind the other. Parameters, their gradients and tensors of other subgraphs take no memory here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_pipeweaver.semu.graph import Device, Graph, Memory, OperatorNode, Store, TensorNode
from megatron_pipeweaver.semu.strategies import Recomputed, copied_back, held_tensors
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Phase, Subgraph, Work

Latency = Callable[[Operator, Phase], int]
"""Nanoseconds of one phase of an operator."""

_RANK = 0
_MEMORY = Memory(_RANK, Store.DEVICE)


@dataclass(slots=True)
class _Builder:
    """Nodes in the making; tensors are found by name, gradients as ``grad:<name>``."""

    subgraph: Subgraph
    latency: Latency
    operators: list[OperatorNode] = field(default_factory=list)
    tensors: list[TensorNode] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    copied_back: frozenset[str] = frozenset()
    copies: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bases = self.subgraph.bases
        self.sizes = {
            one.name: one.size_bytes
            for one in self.subgraph.tensors
            if not one.parameter and not one.external
        }

    def tensor(self, name: str, size_bytes: int) -> int:
        """Index of the tensor node `name`, made where there is none yet."""
        if name not in self.index:
            self.index[name] = len(self.tensors)
            self.tensors.append(TensorNode(name, size_bytes, _MEMORY))
        return self.index[name]

    def activations(self, names: Iterable[str]) -> tuple[int, ...]:
        """Nodes of those `names` that take memory here, each once."""
        return tuple(
            self.tensor(name, self.sizes[name])
            for name in dict.fromkeys(self.bases.get(name, name) for name in names)
            if name in self.sizes
        )

    def gradients(self, names: Iterable[str]) -> tuple[int, ...]:
        """Nodes of the gradients of those `names` that take memory here, each once."""
        return tuple(
            self.tensor(f"grad:{name}", self.sizes[name])
            for name in dict.fromkeys(names)
            if name in self.sizes
        )

    def hand_back(self, one: Operator) -> None:
        """Have what is there serve as the gradients of the inputs that an operator names."""
        if one.overwrites is not None:
            (kept,) = self.activations((one.overwrites,))
            self.index.setdefault(f"grad:{one.inputs[0]}", kept)
        found = self.index.get(f"grad:{one.outputs[0]}")
        if found is not None:
            for name in one.hands_back:
                self.index.setdefault(f"grad:{name}", found)

    def add(
        self, one: Operator, phase: Phase, reads: tuple[int, ...], writes: tuple[int, ...]
    ) -> None:
        """Add one phase of an operator."""
        scratch_bytes = one.work(phase).scratch_bytes
        if scratch_bytes:
            writes += (self.tensor(f"scratch:{one.name}.{phase}", scratch_bytes),)
        self.operators.append(
            OperatorNode(
                f"{one.name}.{phase}",
                Device(_RANK, one.queue),
                self.latency(one, phase),
                reads,
                writes,
            )
        )

    def run_forward(self, one: Operator, after: tuple[int, ...] = ()) -> None:
        """Add the forward of an operator, behind what writes the tensors `after`."""
        reads = self.activations(one.inputs) + after
        self.add(one, Phase.FORWARD, reads, self.activations(one.outputs))

    def copy_back(self, one: Operator, sources: Iterable[str]) -> None:
        """Copy what an operator made again of `sources` to where it was the first time.

        As Megatron's `CheckpointWithoutOutput` does; all stay until the operator's own backward.
        """
        output = one.outputs[0]
        size_bytes = self.sizes[output]
        copy = Operator(
            name=f"{one.name}.copy",
            kind=OperatorClass.ELEMENTWISE,
            inputs=(output,),
            outputs=(),
            forward=Work(memory_bytes=2 * size_bytes),
        )
        again = self.tensor(f"again:{output}", size_bytes)
        self.add(copy, Phase.FORWARD, self.activations((output,)), (again,))
        self.copies[one.name] = (again, *self.activations(sources))

    def received(self, one: Operator) -> tuple[int, ...]:
        """Nodes of the gradients of what an operator made, as far as there are any."""
        return self.known_gradients(one.outputs)

    def known_gradients(self, names: Iterable[str]) -> tuple[int, ...]:
        """Nodes of the gradients of `names`, as far as there are any."""
        grads = (f"grad:{name}" for name in names)
        return tuple(self.index[name] for name in grads if name in self.index)

    def hold(self, tensors: tuple[int, ...]) -> None:
        """Keep `tensors` to the end of everything so far."""
        devices = {one.device: index for index, one in enumerate(self.operators)}
        last = tuple(sorted(devices.values()))
        device = self.operators[-1].device if self.operators else None
        if device is not None and tensors:
            self.operators.append(OperatorNode("end", device, 0, tensors, (), last))

    def finish(self) -> Graph:
        """The graph."""
        return Graph(operators=tuple(self.operators), tensors=tuple(self.tensors))


def forward_graph(subgraph: Subgraph, latency: Latency, again: Recomputed) -> Graph:
    """The forward; what it keeps and what it hands on is held to its end."""
    build = _Builder(subgraph, latency)
    for one in subgraph.operators:
        build.run_forward(one)
    kept = [one.name for one in held_tensors(subgraph, again)]
    if subgraph.operators:
        kept.extend(subgraph.operators[-1].outputs[:1])
    build.hold(build.activations(kept))
    return build.finish()


def backward_graph(
    subgraph: Subgraph, latency: Latency, again: Recomputed, *, weight_grad: bool = True
) -> Graph:
    """The backward from the gradient of the last output, with what has to run again.

    Args:
        subgraph: whose backward.
        latency: nanoseconds of operators.
        again: what the forward dropped.
        weight_grad: run weight gradients as well.
    """
    build = _Builder(
        subgraph,
        latency,
        dropped=again.operators,
        copied_back=copied_back(subgraph, again),
    )
    at_hand = {one.name for one in held_tensors(subgraph, again)}
    build.activations(at_hand_in_order(subgraph, at_hand))
    producers = {name: one for one in subgraph.operators for name in one.outputs}
    if subgraph.operators:
        build.gradients(subgraph.operators[-1].outputs[:1])
    blocks = list(again.blocks)
    ends: dict[str, tuple[int, ...]] = {}
    for one in reversed(subgraph.operators):
        # A block runs when its own backward comes, or before that, when what it dropped is needed.
        missing = {build.bases.get(name, name) for name in one.saves} - at_hand
        needed = {one.name, *(producers[name].name for name in missing if name in producers)}
        for block in [block for block in blocks if not needed.isdisjoint(block)]:
            blocks.remove(block)
            _run_block(build, block, at_hand, build.received(one))
            first = next(each.name for each in subgraph.operators if each.name in block)
            # What came out of it again is held to the end of its own backward.
            ends[first] = build.activations(_out_of(subgraph, block, one))
        for name in one.saves:
            _bring_back(build, name, at_hand, producers, build.received(one))
        _add_gradients(build, one, producers, weight_grad=weight_grad)
        build.hold(ends.get(one.name, ()))
    if subgraph.tensors:
        build.hold(build.known_gradients(one.name for one in subgraph.tensors[:1]))  # handed on
    return build.finish()


def _out_of(subgraph: Subgraph, block: frozenset[str], last: Operator) -> tuple[str, ...]:
    """What comes out of a block: of its `last` operator, or what that one, behind it, has kept."""
    if last.name in block:
        return last.outputs[:1]
    made = {name for one in subgraph.operators if one.name in block for name in one.outputs}
    return tuple(
        name
        for one in subgraph.operators
        if one.name not in block
        for name in one.inputs
        if name in made
    )


def at_hand_in_order(subgraph: Subgraph, names: set[str]) -> list[str]:
    """`names` in the subgraph's order, so that equal inputs give equal graphs."""
    return [one.name for one in subgraph.tensors if one.name in names]


def _run_block(
    build: _Builder, block: frozenset[str], at_hand: set[str], after: tuple[int, ...]
) -> None:
    """Run all operators of `block` again, when gradients `after` are there."""
    for one in build.subgraph.operators:
        if one.name in block:
            build.run_forward(one, after)
            at_hand.update(one.outputs)


def _bring_back(
    build: _Builder,
    name: str,
    at_hand: set[str],
    producers: dict[str, Operator],
    after: tuple[int, ...],
) -> None:
    """Run again what writes `name`, and what that reads, unless it is at hand.

    Whose backward needs it has its gradients `after` by then: autograd runs nothing again beside
    the collective that brings them.
    """
    name = build.bases.get(name, name)
    if name in at_hand or name not in build.sizes or name not in producers:
        return
    one = producers[name]
    for source in one.inputs:
        _bring_back(build, source, at_hand, producers, after)
    build.run_forward(one, after)
    at_hand.update(one.outputs)
    if one.name in build.copied_back:
        build.copy_back(one, _sources(build, one, producers))


def _sources(build: _Builder, one: Operator, producers: Mapping[str, Operator]) -> Iterator[str]:
    """What an operator reads, or what those read that run again for it alone."""
    for name in one.inputs:
        maker = producers.get(build.bases.get(name, name))
        if maker is not None and maker.name in build.dropped - build.copied_back:
            yield from _sources(build, maker, producers)
        else:
            yield name


def _add_gradients(
    build: _Builder, one: Operator, producers: dict[str, Operator], *, weight_grad: bool
) -> None:
    """Input gradient, then weight gradient, of one operator."""
    received = build.received(one)
    kept = build.activations(one.saves) + build.copies.get(one.name, ())
    needs_inputs = one.input_grad != NO_WORK or one.weight_grad == NO_WORK
    gathered = _gather_again(build, one, producers, received) if weight_grad else ()
    build.hand_back(one)
    if needs_inputs:
        build.add(one, Phase.INPUT_GRAD, received + kept, build.gradients(one.inputs))
    if weight_grad and one.weight_grad != NO_WORK and one.kind is not OperatorClass.ALL_GATHER:
        build.add(one, Phase.WEIGHT_GRAD, received + kept + gathered, ())


def _gather_again(
    build: _Builder, one: Operator, producers: dict[str, Operator], after: tuple[int, ...]
) -> tuple[int, ...]:
    """With sequence parallelism a linear keeps its shard, so its whole input is gathered again.

    That begins with the linear's backward, `after` its gradients are there, and hides behind the
    input gradient.
    """
    source = producers.get(one.inputs[0]) if one.inputs else None
    if source is None or source.kind is not OperatorClass.ALL_GATHER or one.weight_grad == NO_WORK:
        return ()
    whole = source.outputs[0]
    tensor = build.tensor(f"again:{whole}", build.sizes[whole])
    build.add(source, Phase.WEIGHT_GRAD, build.activations(source.inputs) + after, (tensor,))
    return (tensor,)
