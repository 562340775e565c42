"""Under which of Megatron's arguments plans split backwards."""

from types import SimpleNamespace

import pytest

from megatron_pipeweaver.plugin import delayed
from megatron_pipeweaver.plugin.delayed import splits_backwards

ENGINE = {
    "transformer_impl": "transformer_engine",
    "tensor_model_parallel_size": 2,
    "sequence_parallel": False,
    "moe_grouped_gemm": False,
    "gradient_accumulation_fusion": False,
    "tp_comm_overlap": False,
}


@pytest.mark.parametrize(
    ("arguments", "splits"),
    [
        ({}, True),
        ({"sequence_parallel": True}, False),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 1}, True),
        ({"moe_grouped_gemm": True}, False),
        ({"moe_grouped_gemm": True, "gradient_accumulation_fusion": True}, True),
        ({"tp_comm_overlap": True}, False),
        ({"transformer_impl": "local", "sequence_parallel": True}, True),
    ],
)
def test_only_what_can_wait_is_split(arguments, splits):
    assert splits_backwards(SimpleNamespace(**{**ENGINE, **arguments})) is splits


@pytest.mark.parametrize(("version", "splits"), [("2.2.0", False), ("2.3.0", True)])
def test_older_versions_of_transformer_engine_compute_all_at_once(monkeypatch, version, splits):
    monkeypatch.setattr(delayed, "HAVE_TE", True)
    monkeypatch.setattr(delayed, "is_te_min_version", lambda least: version >= least)
    assert splits_backwards(SimpleNamespace(**ENGINE)) is splits
