"""What an operator costs, before any device is known: FLOPs, bytes moved, bytes sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from megatron_pipeweaver.errors import ConfigError


class OperatorClass(StrEnum):
    """Operators that share efficiency factors."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    NORM = "norm"
    SOFTMAX = "softmax"
    ELEMENTWISE = "elementwise"
    ACTIVATION = "activation"
    GATED_ACTIVATION = "gated_activation"
    EMBEDDING = "embedding"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    RING_EXCHANGE = "ring_exchange"
    SEND = "send"
    HOST_COPY = "host_copy"
    OPTIMIZER = "optimizer"


class Queue(StrEnum):
    """Devices of one rank that work side by side; each runs its operators in order."""

    COMPUTE = "compute"
    TENSOR_LINK = "tensor_link"
    PIPELINE_LINK = "pipeline_link"
    DATA_LINK = "data_link"
    CONTEXT_LINK = "context_link"
    EXPERT_LINK = "expert_link"
    HOST_LINK = "host_link"


class Phase(StrEnum):
    """The three parts of an operator's work in training."""

    FORWARD = "forward"
    INPUT_GRAD = "input_grad"
    WEIGHT_GRAD = "weight_grad"


@dataclass(frozen=True, slots=True)
class Work:
    """One phase of one operator on one rank.

    `flops` counts a multiply and an add as two; `memory_bytes` is what is read and written once;
    `network_bytes` is what this rank sends, in `steps` messages one after another. `shape` is
    ``(m, n, k)`` of a matmul, for efficiency at small sizes, and `count` how many such matmuls run
    as one kernel; `kernels` is how many kernels are launched. `scratch_bytes` are taken while it
    runs, beside the tensors that it reads and writes.
    """

    flops: int = 0
    memory_bytes: int = 0
    network_bytes: int = 0
    steps: int = 0
    shape: tuple[int, ...] = ()
    count: int = 1
    kernels: int = 1
    scratch_bytes: int = 0

    def __post_init__(self) -> None:
        amounts = (self.flops, self.memory_bytes, self.network_bytes, self.scratch_bytes)
        if min(*amounts, self.steps, self.kernels) < 0:
            raise ConfigError(f"work: {self}: flops, bytes, steps and kernels must be >= 0")


NO_WORK = Work(kernels=0)
"""A phase in which an operator does nothing: no launch, no time."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor node; all but `parameter` and `external` ones live as long as they are needed.

    `external` tensors belong to another subgraph, which counts them. A tensor with a `base` is a
    view: keeping it keeps the base's bytes, whole. `expert` parameters differ between
    expert-parallel ranks.
    """

    name: str
    elements: int
    element_bytes: int
    parameter: bool = False
    external: bool = False
    base: str | None = None
    expert: bool = False

    def __post_init__(self) -> None:
        if self.elements < 0 or self.element_bytes < 1:
            raise ConfigError(
                f"tensor {self.name!r}: {self.elements} elements of {self.element_bytes} bytes"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor holds."""
        return self.elements * self.element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator node: what it reads, writes, keeps for its backward, and costs in each phase.

    The gradients of inputs that it `hands_back` are its output's own, with no memory of theirs;
    that of its first input is written over what it keeps as `overwrites`, if it does so.
    """

    name: str
    kind: OperatorClass
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saves: tuple[str, ...] = ()
    forward: Work
    input_grad: Work = NO_WORK
    weight_grad: Work = NO_WORK
    queue: Queue = Queue.COMPUTE
    hands_back: tuple[str, ...] = ()
    overwrites: str | None = None

    def work(self, phase: Phase) -> Work:
        """The work of one phase."""
        match phase:
            case Phase.FORWARD:
                return self.forward
            case Phase.INPUT_GRAD:
                return self.input_grad
            case Phase.WEIGHT_GRAD:
                return self.weight_grad


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgraph:
    """Operators in a valid order, and the tensors between them: a layer, an embedding, a head.

    The first tensor is the input that the stage in front hands over (none in an embedding).
    """

    name: str
    operators: tuple[Operator, ...]
    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        known = {tensor.name for tensor in self.tensors}
        if len(known) != len(self.tensors):
            raise ConfigError(f"subgraph {self.name!r}: tensor names repeat")
        for one in self.operators:
            missing = {*one.inputs, *one.outputs, *one.saves} - known
            if missing:
                raise ConfigError(
                    f"subgraph {self.name!r}, operator {one.name!r}: no tensors {sorted(missing)}"
                )

    def kernels(self, phase: Phase) -> int:
        """Kernels that are launched in one phase."""
        return sum(one.work(phase).kernels for one in self.operators)

    @property
    def output_bytes(self) -> int:
        """Bytes of what the last operator hands on."""
        last = self.operators[-1].outputs[0] if self.operators else None
        return sum(one.size_bytes for one in self.tensors if one.name == last)

    @property
    def parameters(self) -> int:
        """Number of parameters that this rank holds."""
        return sum(tensor.elements for tensor in self.tensors if tensor.parameter)

    @property
    def expert_parameters(self) -> int:
        """Those of `parameters` that differ between expert-parallel ranks."""
        return sum(tensor.elements for tensor in self.tensors if tensor.parameter and tensor.expert)

    def flops(self, phase: Phase) -> int:
        """FLOPs of one phase."""
        return sum(one.work(phase).flops for one in self.operators)

    def saved(self) -> tuple[Tensor, ...]:
        """The tensors, parameters apart, that the forward keeps for the backward."""
        return self.stored(name for one in self.operators for name in one.saves)

    def stored(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        """The tensors whose bytes `names` are in: no views, no parameters, none of others."""
        bases = self.bases
        wanted = {bases.get(name, name) for name in names}
        return tuple(
            one
            for one in self.tensors
            if one.name in wanted and not one.parameter and not one.external
        )

    @property
    def bases(self) -> Mapping[str, str]:
        """The tensor that each view is a view of."""
        return {one.name: one.base for one in self.tensors if one.base is not None}

    @property
    def saved_bytes(self) -> int:
        """Bytes that the forward keeps for the backward."""
        return sum(tensor.size_bytes for tensor in self.saved())
