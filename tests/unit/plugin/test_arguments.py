"""The flags: what they read, what they refuse, and that Megatron's parser takes them."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.plugin.arguments import (
    WAIT,
    Fallback,
    PipeWeaverArguments,
    add_pipeweaver_arguments,
    read_arguments,
    settle_virtual_size,
)
from megatron_pipeweaver.plugin.combinations import _REFUSED, check_combinations


def parse(*flags):
    return add_pipeweaver_arguments(argparse.ArgumentParser()).parse_args(flags)


def read(*flags):
    return read_arguments(parse("--pipeweaver", *flags))


def megatron(**more):
    return argparse.Namespace(pipeline_model_parallel_size=4, **more)


def test_without_the_switch_there_is_nothing():
    assert read_arguments(parse()) is None
    assert read_arguments(argparse.Namespace()) is None


def test_the_switch_alone_means_the_defaults():
    assert read() == PipeWeaverArguments()


def test_every_flag_is_read():
    found = read(
        *("--pipeweaver-search-seconds", "2.5", "--pipeweaver-search-threads", "3"),
        *("--pipeweaver-sub-microbatch", "vision=12"),
        *("--pipeweaver-segments", "vision=2,language=1"),
        *("--pipeweaver-layers", "audio=2:1", "--pipeweaver-balance"),
        *("--pipeweaver-device-profile", "H100", "--pipeweaver-memory-fraction", "0.8"),
        *("--pipeweaver-strategies", "offload,keep"),
        *("--pipeweaver-deterministic", "--pipeweaver-fallback", "wait"),
        *("--pipeweaver-trace-dir", "traces", "--pipeweaver-dry-run", "5"),
    )
    assert found == PipeWeaverArguments(
        search_seconds=2.5,
        search_threads=3,
        sub_microbatch={"vision": 12},
        segments={"vision": 2, "language": 1},
        layers={"audio": (2, 1)},
        balance=True,
        device_profile="H100",
        strategies=(LayerStrategy.OFFLOAD, LayerStrategy.KEEP),
        memory_fraction=0.8,
        deterministic=True,
        fallback=WAIT,
        trace_dir=Path("traces"),
        dry_run=5,
    )
    search = found.search_config(seed=7, split_weight_grad=True)
    assert (search.time_budget_ns, search.threads, search.seed) == (2_500_000_000, 3, 7)
    assert search.deterministic
    assert search.split_weight_grad
    assert not found.search_config(seed=7, split_weight_grad=False).split_weight_grad


@pytest.mark.parametrize(
    ("text", "bound_ms"), [("static", 2000), ("static:0", 0), ("static:750", 750), ("wait", None)]
)
def test_the_bound_of_a_fallback_is_in_milliseconds(text, bound_ms):
    assert read("--pipeweaver-fallback", text).fallback == Fallback(bound_ms=bound_ms)


@pytest.mark.parametrize("text", ["hope", "static:", "static:-1", "static:1.5", "wait:3"])
def test_a_fallback_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        read("--pipeweaver-fallback", text)
    assert "give static, static:MILLISECONDS or wait" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wrong"), [("keep,magic", "magic"), ("", ""), ("keep,offload,keep", "keep")]
)
def test_strategies_that_are_none_are_refused_in_one_line(text, wrong, capsys):
    with pytest.raises(SystemExit) as error:
        read("--pipeweaver-strategies", text)
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--pipeweaver-strategies: cannot read {wrong!r} of {text!r}; give each" in last
    assert last.endswith("recompute_shared_experts, recompute_up_projection, offload")


FILE = {
    "search_seconds": 3,
    "search_threads": 2,
    "sub_microbatch": {"vision": 4},
    "segments": {"language": 2},
    "layers": {"audio": [2, 0]},
    "balance": True,
    "device_profile": "A100",
    "strategies": ["recompute", "offload"],
    "memory_fraction": 0.5,
    "host_memory_fraction": 0.25,
    "deterministic": True,
    "fallback": "wait",
    "trace_dir": "there",
    "dry_run": 1,
}


def test_a_file_holds_every_flag_and_the_command_line_wins(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(FILE))
    found = read("--pipeweaver-config", str(path), "--pipeweaver-segments", "vision=3")
    assert found == PipeWeaverArguments(
        **{
            **FILE,
            "segments": {"vision": 3},
            "layers": {"audio": (2, 0)},
            "strategies": (LayerStrategy.RECOMPUTE, LayerStrategy.OFFLOAD),
            "trace_dir": Path("there"),
            "fallback": WAIT,
        }
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"speed": 1}', r"unknown key 'speed'"),
        ('{"segments": 2}', r"\$\.segments: is 2; it must be an object"),
        ('{"segments": {"vision": 0}}', r"\$\.segments\.vision: is 0"),
        (
            '{"fallback": "hope"}',
            r"\$\.fallback: is 'hope'; give static, static:MILLISECONDS or wait",
        ),
        ('{"strategies": "keep"}', r'\$\.strategies: is "keep"; it must be an array'),
        ('{"strategies": ["keep", "magic"]}', r"\$\.strategies: cannot read 'magic' of"),
        ('{"memory_fraction": true}', r"\$\.memory_fraction: is true; it must be a number"),
        ('{"search_seconds": NaN}', r"\$\.search_seconds: is NaN; it must be finite"),
        ('{"memory_fraction": 1.5}', r"--pipeweaver-memory-fraction 1\.5"),
        ("{", "not readable JSON"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, text, message):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read("--pipeweaver-config", str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read("--pipeweaver-config", str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--pipeweaver-search-seconds", "-1"),
        ("--pipeweaver-search-seconds", "nan"),
        ("--pipeweaver-search-threads", "0"),
        ("--pipeweaver-memory-fraction", "0"),
        ("--pipeweaver-host-memory-fraction", "1.5"),
        ("--pipeweaver-dry-run", "0"),
        ("--pipeweaver-segments", "vision=0"),
        ("--pipeweaver-sub-microbatch", "vision=0"),
    ],
    ids=" ".join,
)
def test_values_out_of_range_are_refused_by_their_flag(flags):
    with pytest.raises(ConfigError, match=f"^{flags[0]} "):
        read(*flags)


@pytest.mark.parametrize("text", ["vision", "vision=", "=2", "vision=x", "vision=1,vision=2", ""])
def test_counts_that_cannot_be_read_end_the_parser(text, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--pipeweaver-segments", text)
    assert end.value.code == 2
    assert "give each module once, as in vision=2,language=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--pipeweaver-segments", "vision=2"),
        ("--pipeweaver-deterministic",),
        ("--pipeweaver-config", "file"),
    ],
    ids=" ".join,
)
def test_flags_without_the_switch_are_refused(flags):
    with pytest.raises(ConfigError, match=f"^{flags[0]}: does nothing without --pipeweaver"):
        read_arguments(parse(*flags))


def experts(**more):
    """What Megatron's arguments say of experts, so far that all of it can run."""
    return {
        "num_experts": 8,
        "moe_router_load_balancing_type": "aux_loss",
        "context_parallel_size": 1,
        "moe_z_loss_coeff": None,
        "tensor_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "moe_shared_expert_intermediate_size": None,
        "moe_grouped_gemm": False,
        "moe_input_jitter_eps": None,
        "add_bias_linear": True,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        **more,
    }


def latent(**more):
    """What Megatron's arguments say of latent attention, so far that all of it can run."""
    return {
        "multi_latent_attention": True,
        "position_embedding_type": "rope",
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 1,
        "transformer_impl": "local",
        **more,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            latent(position_embedding_type="mrope"),
            "--position-embedding-type mrope and --multi-latent-attention .* give rope",
        ),
        (latent(sequence_parallel=False), "--tensor-model-parallel-size 2 .* --sequence-parallel"),
        (
            latent(context_parallel_size=2, seq_length=32),
            "--context-parallel-size 2 .* needs Transformer Engine",
        ),
        (latent(mla_down_proj_fusion=True), "--mla-down-proj-fusion with --pipeweaver"),
        ({"pipeline_model_parallel_size": 1}, "give --pipeline-model-parallel-size 2 or more"),
        ({"num_virtual_stages_per_pipeline_rank": 2}, "use --pipeweaver-segments instead"),
        ({"pipeline_model_parallel_layout": "E|t*3"}, "--pipeline-model-parallel-layout E"),
        ({"overlap_param_gather_with_optimizer_step": True}, "leave it out"),
        ({"recompute_granularity": "full"}, "--recompute-granularity full with --pipeweaver"),
        ({"cuda_graph_impl": "local"}, "which a graph cannot replay"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 with --pipeweaver"),
        (
            {"context_parallel_size": 3, "seq_length": 32, "sequence_parallel": False},
            "--seq-length 32 with --context-parallel-size 3 .* give a multiple of 6",
        ),
        (
            {
                "context_parallel_size": 2,
                "seq_length": 36,
                "sequence_parallel": True,
                "tensor_model_parallel_size": 4,
            },
            "give a multiple of 8",
        ),
        (experts(moe_router_load_balancing_type=["aux_loss", "global_aux_loss"]), "give aux_loss"),
        (experts(context_parallel_size=2, seq_length=None), "its auxiliary loss would count"),
        (
            experts(
                context_parallel_size=2,
                seq_length=None,
                moe_router_load_balancing_type="none",
                moe_z_loss_coeff=0.1,
            ),
            "its auxiliary loss would count",
        ),
        (experts(expert_tensor_parallel_size=2), "--expert-tensor-parallel-size 2 .* give 1"),
        (experts(moe_shared_expert_intermediate_size=8), "add --disable-bias-linear"),
        (experts(moe_grouped_gemm=True), "--moe-grouped-gemm with .* Transformer Engine"),
        (
            experts(moe_grouped_gemm=True, transformer_impl="transformer_engine"),
            "--use-cpu-initialization with --pipeweaver",
        ),
        (experts(moe_use_upcycling=True), "--moe-use-upcycling with --pipeweaver"),
    ],
    ids=str,
)
def test_what_cannot_work_together_is_refused(arguments, message):
    args = argparse.Namespace(**{"pipeline_model_parallel_size": 4, **arguments})
    with pytest.raises(ConfigError, match=message) as refusal:
        check_combinations(args, PipeWeaverArguments())
    assert "\n" not in str(refusal.value)


REFUSED_VALUES = {
    "num_layers_per_virtual_pipeline_stage": 1,
    "num_virtual_stages_per_pipeline_rank": 2,
    "pipeline_model_parallel_layout": "E|t*3",
    "decoder_first_pipeline_num_layers": 3,
    "decoder_last_pipeline_num_layers": 3,
    "recompute_granularity": "selective",
    "cuda_graph_impl": "local",
    "cpu_offloading_num_layers": 2,
    "mlp_chunks_for_training": 2,
    "mtp_num_layers": 1,
}
"""Values of the arguments that are no switches."""


@pytest.mark.parametrize("name", list(_REFUSED))
def test_every_argument_that_is_refused_is_named_with_what_to_do(name):
    refused = megatron(**{name: REFUSED_VALUES.get(name, True)})
    flag = "--" + name.replace("_", "-")
    with pytest.raises(
        ConfigError, match=f"^{flag}.* with --pipeweaver: .*(leave it out|use|give)"
    ):
        check_combinations(refused, PipeWeaverArguments())
    off = megatron(**{name: None})
    check_combinations(off, PipeWeaverArguments())


def test_what_can_work_together_passes():
    args = megatron(
        cuda_graph_impl="none",
        context_parallel_size=2,
        seq_length=36,
        sequence_parallel=False,
        recompute_granularity=None,
        hidden_dropout=0.1,
        attention_dropout=0.0,
    )
    check_combinations(args, PipeWeaverArguments())
    args.hidden_dropout = 0.0
    check_combinations(args, PipeWeaverArguments(deterministic=True))


def test_deterministic_order_and_dropout_are_refused():
    with pytest.raises(ConfigError, match="--hidden-dropout 0"):
        check_combinations(megatron(hidden_dropout=0.1), PipeWeaverArguments(deterministic=True))


def test_deterministic_order_and_jitter_are_refused():
    args = megatron(**experts(moe_input_jitter_eps=0.01))
    check_combinations(args, PipeWeaverArguments())
    with pytest.raises(ConfigError, match=r"--moe-input-jitter-eps 0.01 and --pipeweaver-det"):
        check_combinations(args, PipeWeaverArguments(deterministic=True))


def test_the_virtual_size_is_the_number_of_chunks():
    args = megatron(virtual_pipeline_model_parallel_size=None)
    settle_virtual_size(args, 3)
    assert args.virtual_pipeline_model_parallel_size == 3
    settle_virtual_size(args, 1)
    assert args.virtual_pipeline_model_parallel_size is None


def test_names_do_not_meet_megatrons_own():
    arguments = pytest.importorskip(
        "megatron.training.arguments", reason="this megatron-core has no megatron.training"
    )
    parser = add_pipeweaver_arguments(
        arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    )
    args = parser.parse_args(["--pipeweaver", "--pipeweaver-segments", "vision=2"])
    assert read_arguments(args).segments == {"vision": 2}


def test_layers_are_read_alike_from_a_file(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"layers": {"vision": [4, 0], "language": [1, 2, 3, 4]}}))
    in_file = read("--pipeweaver-config", str(path))
    assert in_file == read("--pipeweaver-layers", "vision=4:0,language=1:2:3:4")
    assert in_file.layers == {"vision": (4, 0), "language": (1, 2, 3, 4)}


@pytest.mark.parametrize("text", ["", "vision", "vision=", "vision=1:", "vision=1:-1", "v=1,v=2"])
def test_layers_that_are_none_are_refused_in_one_line(text, capsys):
    with pytest.raises(SystemExit) as error:
        read("--pipeweaver-layers", text)
    assert error.value.code == 2
    assert "give each module once, with its layers" in capsys.readouterr().err.splitlines()[-1]


def test_layers_and_segments_of_one_module_are_refused():
    with pytest.raises(ConfigError, match="of vision: its layers say how many segments it has"):
        read("--pipeweaver-layers", "vision=1:1", "--pipeweaver-segments", "vision=1")
