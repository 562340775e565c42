from types import SimpleNamespace

import megatron.core
import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from megatron_pipeweaver.errors import UnsupportedMegatronError
from megatron_pipeweaver.plugin import compat


def plain_config(**fields):
    return SimpleNamespace(
        timers=None, grad_scale_func=None, deallocate_pipeline_outputs=False, **fields
    )


def test_installed_version_is_known():
    compat.check_version()


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0rc3", "0.18.2+local", "0.19.2"])
def test_known_versions(version):
    compat.check_version(version)


@pytest.mark.parametrize("version", ["0.9.0", "0.16.0", "0.20.0", "1.0", ""])
def test_unknown_versions_are_refused_by_name(version):
    with pytest.raises(UnsupportedMegatronError, match=f"megatron-core {version}"):
        compat.check_version(version)


def test_a_changed_function_is_refused(monkeypatch):
    monkeypatch.setattr(schedules, "backward_step", lambda tensor, config: None)
    with pytest.raises(UnsupportedMegatronError, match="backward_step takes"):
        compat.check_version(megatron.core.__version__)


def test_backward_step_gives_input_gradients():
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    output = 2 * first + 3 * second
    grads = compat.backward_step([first, second], output, torch.tensor([1.0, 10.0]), plain_config())
    assert torch.equal(grads[0], torch.tensor([2.0, 20.0]))
    assert torch.equal(grads[1], torch.tensor([3.0, 30.0]))


def test_backward_step_scales_a_loss():
    weight = torch.ones(2, requires_grad=True)
    config = plain_config()
    config.grad_scale_func = lambda loss: loss * 8
    assert compat.backward_step([None], weight.sum(), None, config) == [None]
    assert torch.equal(weight.grad, torch.tensor([8.0, 8.0]))


def test_deallocated_output_keeps_its_graph():
    leaf = torch.ones(4, requires_grad=True)
    output = leaf * 2
    kept = output.detach()
    compat.deallocate_output_tensor(output, False)
    assert output.numel() == 4
    compat.deallocate_output_tensor(output, True)
    assert output.numel() == 1
    config = plain_config()
    config.deallocate_pipeline_outputs = True
    (grad,) = compat.backward_step([leaf], output, torch.ones(4), config)
    assert torch.equal(grad, torch.full((4,), 2.0))
    assert torch.equal(kept, torch.full((4,), 2.0))


def test_finalize_order_puts_the_embedding_first_and_keeps_the_rest():
    def chunk(name, embeds):
        module = torch.nn.Identity()
        module.name, module.embeds_tokens = name, embeds
        return module

    chunks = [chunk("vision0", False), chunk("vision2", False), chunk("language0", True)]
    chunks.append(chunk("language2", False))
    order = [one.name for one in compat.finalize_order(chunks)]
    assert order == ["language0", "vision0", "vision2", "language2"]
