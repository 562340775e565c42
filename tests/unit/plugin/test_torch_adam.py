"""torch's Adam in Megatron's distributed optimizer: Megatron's mistakes, and their mends."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_pipeweaver.plugin.torch_adam import (
    get_hook,
    load_hook,
    set_hook,
    state_dict_hook,
    torch_adam_patches,
)


@pytest.fixture
def parameters():
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]


@pytest.fixture
def distributed(parameters):
    """What the hooked methods need of a `DistributedOptimizer`."""
    return SimpleNamespace(
        optimizer=torch.optim.AdamW(parameters, lr=0.1),
        grad_scaler=None,
        model_param_group_index_map={one: (0, index) for index, one in enumerate(parameters)},
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
    )


def steps(distributed):
    return [float(one["step"]) for one in distributed.optimizer.state.values()]


def test_an_optimizer_that_made_no_step_has_a_state(distributed):
    with pytest.raises(AssertionError):
        DistributedOptimizer.state_dict(distributed)
    found = state_dict_hook(DistributedOptimizer.state_dict)(distributed)
    assert found["optimizer"]["param_groups"][0]["step"] == 0


def test_every_parameter_counts_its_own_steps_behind_a_load(distributed, parameters):
    def megatrons(self, state_dict):
        shared = torch.tensor(float(state_dict["step"]))
        for one in parameters:
            state = {"exp_avg": torch.zeros_like(one), "exp_avg_sq": torch.zeros_like(one)}
            self.optimizer.state[one] = {"step": shared, **state}

    load_hook(megatrons)(distributed, {"step": 7})
    for one in parameters:
        one.grad = torch.ones_like(one)
    distributed.optimizer.step()
    assert steps(distributed) == [8, 8]


def test_a_step_is_neither_sharded_nor_overwritten(distributed, parameters):
    state_dict_hook(DistributedOptimizer.state_dict)(distributed)
    get = get_hook(DistributedOptimizer._get_main_param_and_optimizer_states)
    assert get(distributed, parameters[0]).keys() == {"param", "exp_avg", "exp_avg_sq"}
    stored = {name: torch.full((3,), 5.0) for name in ("param", "exp_avg", "exp_avg_sq")}
    distributed.optimizer.state[parameters[0]]["step"].fill_(4)
    put = set_hook(DistributedOptimizer._set_main_param_and_optimizer_states)
    put(distributed, parameters[0], stored)
    assert torch.equal(parameters[0], stored["param"])
    assert torch.equal(distributed.optimizer.state[parameters[0]]["exp_avg_sq"], stored["param"])
    assert steps(distributed) == [4, 0]


def test_the_patches_name_what_megatron_has():
    for patch in torch_adam_patches():
        assert callable(getattr(patch.target, patch.name))
