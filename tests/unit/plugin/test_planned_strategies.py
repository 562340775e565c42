"""Which memory strategies plans of Megatron's training may use."""

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.plugin.arguments import PipeWeaverArguments
from megatron_pipeweaver.plugin.training import planned_strategies
from megatron_pipeweaver.semu.devices import load_device

KEEP, OFFLOAD, NORM = LayerStrategy.KEEP, LayerStrategy.OFFLOAD, LayerStrategy.NORM


def strategies(*, device="cpu", local=True, latent=False, **arguments):
    ours = PipeWeaverArguments(device_profile=device, **arguments)
    return planned_strategies(ours, load_device(device), local=local, latent=latent)


@pytest.mark.parametrize("local", [False, True])
def test_layers_go_to_the_host_where_there_is_a_gpu(monkeypatch, local):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert OFFLOAD not in strategies(local=local)
    assert OFFLOAD not in strategies(local=local, device="H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert OFFLOAD in strategies(local=local, device="H100")


def test_a_dry_run_plans_for_the_device_that_it_emulates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert OFFLOAD in strategies(device="H100", dry_run=1)
    assert OFFLOAD not in strategies(device="cpu", dry_run=1)


@pytest.mark.parametrize("local", [False, True])
def test_up_projections_are_planned_where_attention_is_latent(local):
    up = LayerStrategy.UP_PROJECTION
    assert up not in strategies(local=local)
    assert up in strategies(local=local, latent=True)
    assert strategies(local=local, strategies=(KEEP, up)) == (KEEP, up)


def test_what_is_asked_for_is_planned_with():
    assert strategies(strategies=(KEEP, OFFLOAD)) == (KEEP, OFFLOAD)
    assert strategies(strategies=(NORM,)) == (NORM,)


def test_what_transformer_engines_layers_cannot_do_is_refused():
    assert NORM not in strategies(local=False)
    with pytest.raises(
        ConfigError, match=r"--pipeweaver-strategies recompute_norm: Transformer Engine's layers"
    ):
        strategies(local=False, strategies=(KEEP, NORM))
