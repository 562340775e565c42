"""A backward in two halves that goes through its graph once.

    output ─► mm ─► tanh ─► mm ─► input     input gradients: along this line, and what arrives at
              │             │               each fork is kept
              ▼             ▼
              W1            W0              weight gradients: from each fork down to its weights

A *fork* is a node from which one way leads on to the inputs and another one to weights alone. The
engine computes of a node what it is asked for, so a product's two gradients are computed once each,
in one half or in the other. Zero-bubble schedules split their backwards so; torch's own pipelines
begin their weight gradients at such nodes too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass(slots=True, kw_only=True)
class _Group:
    """Weights that hang on the same forks, and what has arrived there."""

    weights: list[Tensor]
    forks: list[Node]
    arrived: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)


class SplitBackward:
    """The backward of one output, input gradients first and weight gradients later.

    Gradients are added to the leaves' ``grad``, each to the last bit as in a backward in one piece.
    A weight that is used at several places on one way to the inputs has its gradient computed with
    the input gradients, and added later: from the first such place the engine would go on to the
    next one again.

    Args:
        output: where the graph ends.
        inputs: leaves whose gradients are wanted first.
        weights: the other leaves; those that `output` does not depend on get no gradient.
        at_once: compute all weights' gradients with the input gradients, and only add them later:
            where forwards run again, what they save would have to be held until then.
    """

    def __init__(
        self,
        output: Tensor,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        *,
        at_once: bool = False,
    ) -> None:
        root = output.grad_fn
        assert root is not None  # else there is no backward
        self._output: Tensor | None = output
        self._inputs = list(inputs)
        self._at_once: list[Tensor] = []
        self._later: list[_Group] = []
        self._found: list[Tensor | None] = []
        graph = _Graph(root, inputs, weights)
        if at_once:
            self._at_once = list(weights)
        elif not graph.leads_to_inputs(root):
            self._inputs = []
            self._later = [_Group(weights=list(weights), forks=[root])]
        else:
            for one in _groups(graph, weights):
                if graph.in_a_row(one.forks):
                    self._at_once += one.weights
                else:
                    self._later.append(one)

    def input_grads(self, grad: Tensor) -> None:
        """Add the inputs' gradients to their ``grad``, from the gradient of the output; once."""
        output, self._output = self._output, None  # from now on the forks hold what is below them
        assert output is not None  # else it has run
        leaves = [*self._inputs, *self._at_once]
        if not leaves:
            for one in self._later:  # one fork, where the graph ends
                one.arrived = {one.forks[0]: (*(None,) * output.output_nr, grad)}
            return
        handles = [
            fork.register_prehook(_keep(one.arrived, fork))
            for one in self._later
            for fork in one.forks
        ]
        try:
            grads = torch.autograd.grad(
                output, leaves, grad, retain_graph=bool(self._later), allow_unused=True
            )
        finally:
            for handle in handles:
                handle.remove()
        split = len(self._inputs)
        _add(self._inputs, grads[:split])
        self._found = list(grads[split:])

    def weight_grads(self) -> None:
        """Add the weights' gradients to their ``grad``; once, behind `input_grads`."""
        _add(self._at_once, self._found)
        self._found = []
        for one in self._later:
            edges = {
                GradientEdge(fork, index): grad
                for fork, grads in one.arrived.items()
                for index, grad in enumerate(grads)
                if grad is not None
            }
            if edges:
                torch.autograd.backward(list(edges), list(edges.values()), inputs=one.weights)
        self._later = []


def _add(leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add gradients, where there are any, to their leaves as the engine does, hooks included."""
    found = [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
    if found:
        torch.autograd.backward([leaf for leaf, _ in found], [grad for _, grad in found])


class _Graph:
    """The nodes under one, by what they lead to."""

    def __init__(self, root: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        input_leaves = {get_gradient_edge(one).node for one in inputs}
        weight_leaves = {get_gradient_edge(one).node for one in weights}
        self._children: dict[Node, tuple[Node, ...]] = {}
        self._to_inputs: set[Node] = set()
        self._weights: dict[Node, frozenset[Node]] = {}
        for node in self._from_the_leaves(root):
            children = self._children[node]
            if node in input_leaves or any(one in self._to_inputs for one in children):
                self._to_inputs.add(node)
                children = tuple(one for one in children if one not in self._to_inputs)
            own = {node} & weight_leaves
            self._weights[node] = frozenset(own.union(*(self._weights[one] for one in children)))

    def leads_to_inputs(self, node: Node) -> bool:
        """Whether a wanted input lies below `node`."""
        return node in self._to_inputs

    def forks(self) -> Iterator[tuple[Node, frozenset[Node]]]:
        """Every fork with the leaves of the weights below it, those on no way to inputs."""
        for node in self._to_inputs:
            if self._weights[node]:
                yield node, self._weights[node]

    def in_a_row(self, nodes: Iterable[Node]) -> bool:
        """Whether one of `nodes` lies below another one."""
        wanted = set(nodes)
        if len(wanted) < 2:
            return False
        below: dict[Node, bool] = {}
        for node, children in self._children.items():  # children come first
            if node in self._to_inputs:
                below[node] = any(one in wanted or below.get(one, False) for one in children)
        return any(below[node] for node in wanted)

    def _from_the_leaves(self, root: Node) -> Iterator[Node]:
        """All nodes under `root`, each behind its children."""
        stack = [root]
        begun: dict[Node, tuple[Node, ...]] = {}
        while stack:
            node = stack[-1]
            if node not in begun:
                begun[node] = tuple(
                    dict.fromkeys(one for one, _ in node.next_functions if one is not None)
                )
                stack += [one for one in begun[node] if one not in begun]
                continue
            stack.pop()
            if node not in self._children:
                self._children[node] = begun[node]
                yield node


def _groups(graph: _Graph, weights: Sequence[Tensor]) -> Iterator[_Group]:
    """Weights and forks, joined where a weight hangs on several forks or a fork has several."""
    tensor_of: Mapping[Node, Tensor] = {get_gradient_edge(one).node: one for one in weights}
    group_of: dict[Node, set[Node]] = {}
    forks: defaultdict[Node, list[Node]] = defaultdict(list)
    for fork, leaves in graph.forks():
        first = next(iter(leaves))
        forks[first].append(fork)
        joined = set(leaves).union(*(group_of.get(leaf, ()) for leaf in leaves))
        group_of.update(dict.fromkeys(joined, joined))
    for leaf, joined in group_of.items():
        if leaf == next(iter(joined)):
            yield _Group(
                weights=[tensor_of[one] for one in joined],
                forks=[fork for one in joined for fork in forks[one]],
            )


def _keep(
    arrived: dict[Node, tuple[Tensor | None, ...]], fork: Node
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook that keeps what arrives at `fork`."""

    def keep(grads: tuple[Tensor | None, ...]) -> None:
        arrived[fork] = grads

    return keep
