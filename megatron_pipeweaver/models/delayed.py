"""Weight gradients of Transformer Engine's linears, left to ops of their own.

Transformer Engine can put a linear's weight gradient off until its ``backward_dw`` is called, but
decides so for a module and a whole run, and takes up one forward after another in the order of
their backwards. A plan splits one pass and not the next, and may finish them in any order. So the
modules stay as they are, and a forward that is split runs with a store of its own (Transformer
Engine's class) and with *stand-ins*: leaves that share the parameters' memory.

    forward: Transformer Engine's, of stand-ins
    B: grad_input; operands and product ──► the store of this forward
    W: backward_dw on that store ──► stand_in.grad ──► the parameter's own accumulation

A parameter's hooks thus see its gradient once, when it is there, as they do in a backward in one
piece; in ``B`` Transformer Engine returns none, which Megatron's DDP would take for a fault.

Read in Transformer Engine 2.20; the store is the same since 2.3, the first version that has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

_PACKAGE = "transformer_engine"
_NORM = "layer_norm_"
"""How the parameters of a norm that is one with its linear are called; they are left to ``B``."""


class Target(Protocol):
    """Where split forwards leave their weight gradients."""

    def add_call(self, one: DelayedCall) -> None:
        """Leave the weight gradients of `one` to ``W``."""


class Targets(Protocol):
    """What says where a forward that runs now leaves its weight gradients."""

    @property
    def target(self) -> Target | None:
        """`None`: its backward computes them itself."""


def can_delay(module: Any) -> bool:
    """Whether the weight gradients of `module`, any module, can wait for a ``W`` of their own.

    Those of Transformer Engine's linears can, but not where more would be held for it than the
    forward holds: gathered operands under sequence parallelism, and results that experts in one
    product make room for in ``B`` unless they are added to ``main_grad``. Products that overlap
    with communication are refused by Transformer Engine.
    """
    if getattr(module, "wgrad_store", None) is None:
        return False
    if module.config.tp_comm_overlap or (module.sequence_parallel and module.tp_size > 1):
        return False
    return bool(module.fuse_wgrad_accumulation or not hasattr(module, "num_gemms"))


def delay(module: Any, targets: Targets) -> None:
    """Have `module` leave the weight gradients of forwards where `targets` says."""
    # Only this instance changes, and it stays an instance of what it was.
    kind: Any = type(module)
    module.__class__ = _delaying(kind)
    module.left_out = targets


class DelayedCall:
    """One forward of one module, whose weight gradients are left out.

    Args:
        module: a linear of Transformer Engine's.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._store = type(module.wgrad_store)(True)
        self._stand_ins = {
            name: _stand_in(one)
            for name, one in module.named_parameters(recurse=False)
            if not name.startswith(_NORM)
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has this call's store, and stand-ins for its parameters, inside."""
        module = self._module
        parameters, store = dict(module._parameters), module.wgrad_store
        module._parameters.update(self._stand_ins)
        module.wgrad_store = self._store
        try:
            yield
        finally:
            module._parameters.update(parameters)
            module.wgrad_store = store

    def tensors(self) -> Iterator[Tensor]:
        """What is held for ``W``: inputs and output gradients."""
        for operands, _ in self._store.context.queue:
            # Where the result goes, if it is named, stands third.
            yield from _flat(operands[:2])

    def finish(self) -> None:
        """Compute the weight gradients that the backward has put off, and accumulate them."""
        if not self._store.context.empty():  # else no gradient has come by, or no weight is trained
            with self.in_place(), torch.no_grad():
                _theirs(type(self._module)).backward_dw(self._module)
        for name, stand_in in self._stand_ins.items():
            parameter = getattr(self._module, name)
            if getattr(stand_in, "grad_added_to_main_grad", False):
                parameter.grad_added_to_main_grad = True
            if stand_in.grad is not None:
                torch.autograd.backward(parameter.expand_as(parameter), stand_in.grad)
        self._stand_ins = {}


class _Delaying:
    """The forward of a linear of Transformer Engine's that can be split."""

    left_out: Targets

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        """Transformer Engine's arguments, tokens first; its output."""
        target = self.left_out.target
        tokens = (*args, *options.values())[0]
        # Behind an input without gradient there is nothing to hand on, and nothing to put off.
        if target is None or not tokens.requires_grad or not torch.is_grad_enabled():
            return super().forward(*args, **options)  # type: ignore[misc]
        call = DelayedCall(self)
        target.add_call(call)
        with call.in_place():
            return super().forward(*args, **options)  # type: ignore[misc]


@functools.cache
def _delaying(kind: Any) -> Any:
    """`kind` with a forward that can be split, under the same name."""
    return type(kind.__name__, (_Delaying, kind), {"__module__": kind.__module__})


def _theirs(kind: type) -> Any:
    """Transformer Engine's class of `kind`.

    Megatron's classes call its ``backward_dw`` only where the whole model was made to delay.
    """
    return next(one for one in kind.__mro__ if one.__module__.partition(".")[0] == _PACKAGE)


def _stand_in(parameter: Any) -> Tensor:
    """A leaf on the parameter's memory, with its marks (``main_grad``) and without its hooks."""
    leaf: Tensor = parameter.detach().requires_grad_(parameter.requires_grad)
    vars(leaf).update(vars(parameter))
    return leaf


def _flat(operands: Any) -> Iterator[Tensor]:
    """The tensors of an operand; experts in one product have a list of them."""
    for one in operands:
        if isinstance(one, list | tuple):
            yield from _flat(one)
        elif isinstance(one, Tensor):
            yield one
