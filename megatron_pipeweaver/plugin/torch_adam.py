"""torch's Adam in Megatron's distributed optimizer: saved, loaded and re-sharded.

Where neither Transformer Engine nor Apex is installed Megatron takes `torch.optim.AdamW`, which
keeps its step as a tensor per parameter where the fused ones keep a number per group. Megatron
(0.16.1 and 0.19.2) has that in mind in some places of `DistributedOptimizer`; in others it has not:

1. `state_dict` wants one common step and asserts in an optimizer that has made none, which every
   load asks for.
2. `load_state_dict` gives all parameters one and the same tensor, which each of them counts up.
3. `_get_main_param_and_optimizer_states` hands the step on as a thing to be sharded; from
   ``dp_reshardable`` checkpoints the step of *before* the load comes back and overwrites it.
4. `_set_main_param_and_optimizer_states` looks for a step in ``fully_reshardable`` checkpoints,
   which have none.
5. The same method copies into fp32 parameters, which autograd forbids outside `torch.no_grad`;
   ``dp_reshardable`` checkpoints are loaded without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_pipeweaver.plugin.patching import Patch


def begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter without state what Adam gives it at its first step, at step 0."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def state_dict_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.state_dict` of an optimizer that may not have stepped yet."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if _is_adam(self):
            begin_state(self.optimizer)
        return original(self)

    return state_dict


def load_hook(original: Callable[..., None]) -> Callable[..., None]:
    """`DistributedOptimizer.load_state_dict` that leaves each parameter a step of its own."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        if _is_adam(self):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def get_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_get_main_param_and_optimizer_states` without the step."""

    @functools.wraps(original)
    def get(self: Any, model_param: torch.nn.Parameter) -> Any:
        tensors = original(self, model_param)
        tensors.pop("step", None)
        return tensors

    return get


def set_hook(original: Callable[..., None]) -> Callable[..., None]:
    """`_set_main_param_and_optimizer_states` that leaves the step, loaded already, alone."""

    @functools.wraps(original)
    def put(self: Any, model_param: torch.nn.Parameter, tensors: Mapping[str, Any]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        kept = {"step": state.pop("step")} if "step" in state else {}
        with torch.no_grad():
            original(self, model_param, tensors)
        state.update(kept)

    return put


def _is_adam(optimizer: Any) -> bool:
    return isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def torch_adam_patches() -> list[Patch]:
    """The patches of `DistributedOptimizer`; none where it runs fused optimizers."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return []
    target = distrib_optimizer.DistributedOptimizer
    hooks = {
        "state_dict": state_dict_hook,
        "load_state_dict": load_hook,
        "_get_main_param_and_optimizer_states": get_hook,
        "_set_main_param_and_optimizer_states": set_hook,
    }
    return [Patch(target, name, hook(getattr(target, name))) for name, hook in hooks.items()]
