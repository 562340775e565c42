import json
import math
import os
from pathlib import Path

import pytest

from megatron_pipeweaver.cli.job_files import SYNTHETIC, load_job
from megatron_pipeweaver.cli.main import main
from megatron_pipeweaver.ir.batch import Item
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import LatentOptions
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.semu.devices import load_device, profile_to_json
from megatron_pipeweaver.semu.options import Attention
from megatron_pipeweaver.semu.presets import module_preset, setup_preset
from tests.unit.cli.test_main import error_of

EXAMPLE = Path(__file__).parents[3] / "benchmarks" / "semu_tune" / "vlm-m-64.json"
QUICK = ["--time-budget", "10", "--max-rounds", "2"]
VISION = {
    "name": "vision",
    "kind": "vision",
    "layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 256,
    "attention_heads": 4,
    "kv_groups": 4,
    "patch_size": 14,
    "output_size": 64,
    "patches_per_token": 16,
}
LANGUAGE = {
    "name": "language",
    "kind": "language",
    "layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 256,
    "attention_heads": 4,
    "kv_groups": 2,
    "after": ["vision"],
    "gated_mlp": True,
    "vocab_size": 1000,
    "layer": {"qk_norm": True, "head_size": 32},
}


def small(**changes: object) -> dict[str, object]:
    """A small job; `changes` of `None` take keys away."""
    job = {
        "format": "pipeweaver.job/1",
        "model": {"name": "small", "modules": [VISION, LANGUAGE]},
        "device": "H800",
        "ranks": 4,
        "parallel": {"pipeline": 2, "data": 2},
        "batch": {
            "microbatches": [
                {"sequence_length": 512, "items": {"vision": [[256, 16, 3], [64, 4]]}},
                {"sequence_length": 512},
            ]
        },
        **changes,
    }
    return {key: value for key, value in job.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def written(**changes: object) -> Path:
        path = tmp_path / "job.json"
        path.write_text(json.dumps(small(**changes)))
        return path

    return written


def table_under(out: str, first: str) -> list[list[str]]:
    """The rows of the table whose header starts with `first`."""
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(first))
    rows = lines[start + 2 :]
    stop = rows.index("") if "" in rows else len(rows)
    return [row.split() for row in rows[:stop]]


def test_the_committed_example_is_the_papers_model():
    file = load_job(EXAMPLE)
    assert file.job.model == setup_preset("vlm-m").model
    assert file.ranks == file.parallel.world_size == 64
    assert file.parallel.sequence_parallel
    counts = [one.count("vision") for one in file.job.microbatches]
    assert len(counts) == 64
    assert min(counts) >= 0
    assert 40 < max(counts) <= 48
    assert file.job.microbatches == SYNTHETIC["images"].draw(64, 0)
    assert file.job.microbatches != SYNTHETIC["images"].draw(64, 1)


def test_everything_in_a_job_is_read(write):
    file = load_job(
        write(
            model={
                "name": "mixed",
                "modules": [
                    VISION,
                    {"preset": "llama3-8b", "layers": 16, "after": ["vision"], "frozen": True},
                ],
            },
            parallel={"pipeline": 4, "tensor": 2, "sequence_parallel": False},
            ranks=None,
            options={"attention": "dense", "element_bytes": 4},
            optimizer={"state_bytes": 8, "distributed": False},
            strategies=["recompute", "offload"],
            sub_microbatch={"vision": 5},
            segments={"language": 2},
        )
    )
    job = file.job
    assert file.ranks == 8
    assert job.model.module("vision").hidden_size == 64
    assert job.model.backbone.layers == 16
    assert job.model.backbone.frozen
    assert job.model.backbone.vocab_size == module_preset("llama3-8b").vocab_size
    assert file.parallel == job.options.parallel == ParallelSizes(pipeline=4, tensor=2)
    assert (job.options.attention, job.options.element_bytes) == (Attention.DENSE, 4)
    assert (job.optimizer.state_bytes, job.optimizer.distributed) == (8, False)
    assert job.strategies == (LayerStrategy.RECOMPUTE, LayerStrategy.OFFLOAD)
    assert (job.sub_microbatch, job.segments) == ({"vision": 5}, {"language": 2})
    assert job.microbatches[0].items["vision"] == (
        *(Item(units=256, tokens=16),) * 3,
        Item(units=64, tokens=4),
    )


def test_a_device_file_is_found_beside_the_job(write, tmp_path):
    profile = load_device("A100")
    (tmp_path / "mine.json").write_bytes(profile_to_json(profile))
    assert load_job(write(device="mine.json")).job.device == profile


def test_emulate_prints_times_and_memory_by_rank(write, capsys):
    assert main(["emulate", str(write()), *QUICK]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("small on 4 H800, 2 microbatches: DP 2, TP 1, PP 2\n")
    for word in ("iteration ", "pipeline ", "peak memory ", "MFU "):
        assert word in out
    times = table_under(out, "rank  ")
    assert [row[0] for row in times] == ["0", "1"]
    busy, bubble = float(times[0][1]), float(times[0][3])
    pipeline = float(out.split("pipeline  ")[1].split()[0])
    assert busy + bubble == pytest.approx(pipeline, abs=0.002)
    assert float(times[0][5]) == 0  # no tensor parallelism
    assert float(times[0][7]) > 0  # two replicas exchange gradients


def test_balance_tells_the_layers_of_every_stage(write, capsys):
    assert main(["emulate", str(write()), *QUICK]) == 0
    assert "layers per stage" not in capsys.readouterr().out
    assert main(["emulate", str(write()), *QUICK, "--balance"]) == 0
    out = capsys.readouterr().out
    (told,) = (line for line in out.splitlines() if line.startswith("layers per stage: "))
    cuts = dict(one.split("=") for one in told.split()[3].rstrip(";").split(","))
    assert {name: sum(map(int, text.split(":"))) for name, text in cuts.items()} == {
        "vision": 4,
        "language": 8,
    }


def test_tensor_parallel_ranks_wait_for_each_other(write, capsys):
    path = write(parallel={"pipeline": 2, "tensor": 2})
    assert main(["emulate", str(path), *QUICK]) == 0
    times = table_under(capsys.readouterr().out, "rank  ")
    assert all(0 < float(row[5]) < float(row[1]) for row in times)
    assert all(float(row[7]) == 0 for row in times)


def test_tune_ranks_what_fits(write, capsys):
    assert main(["tune", str(write()), *QUICK]) == 0
    out = capsys.readouterr().out
    rows = table_under(out, "rank  DP")
    assert [row[0] for row in rows] == [str(place + 1) for place in range(len(rows))]
    sizes = {tuple(row[1:6]) for row in rows}  # DP, TP, CP, EP, PP
    assert sizes >= {("2", "1", "1", "1", "2"), ("1", "4", "1", "1", "1")}
    assert all(math.prod(map(int, row[1:6])) == 4 for row in rows)
    behind = [float(row[row.index("ms") + 1]) for row in rows]
    assert behind[0] == 1
    assert behind == sorted(behind)
    assert main(["tune", str(write()), *QUICK, "--top", "1"]) == 0
    assert len(table_under(capsys.readouterr().out, "rank  DP")) == 1


def test_tune_balances_the_fastest(write, capsys):
    assert main(["tune", str(write()), *QUICK, "--top", "1"]) == 0
    assert "layers per stage" not in capsys.readouterr().out
    assert main(["tune", str(write()), *QUICK, "--top", "1", "--balance"]) == 0
    assert "layers per stage" in capsys.readouterr().out


def test_tune_tries_context_parallelism_when_asked(write, capsys):
    assert main(["tune", str(write()), *QUICK, "--context", "1", "2"]) == 0
    rows = table_under(capsys.readouterr().out, "rank  DP")
    assert {row[3] for row in rows} == {"1", "2"}
    assert all(math.prod(map(int, row[1:6])) == 4 for row in rows)
    told = error_of(capsys, ["tune", write(), "--context", "0"])
    assert told == "tune: context-parallel size 0; need at least 1"


def test_latent_attention_is_read(write):
    sizes = {"kv_rank": 16, "head_size": 8, "rotary_size": 4, "value_size": 12}
    language = {**LANGUAGE, "kv_groups": 4, "layer": {"latent": sizes}}
    job = load_job(write(model={"name": "small", "modules": [VISION, language]}))
    assert job.job.model.backbone.layer.latent == LatentOptions(**sizes)


def test_tune_spreads_experts_over_replicas(write, capsys):
    experts = {"count": 4, "active": 2, "ffn_hidden_size": 32}
    model = {"name": "small", "modules": [VISION, {**LANGUAGE, "layer": {"experts": experts}}]}
    assert main(["tune", str(write(model=model)), *QUICK]) == 0
    rows = table_under(capsys.readouterr().out, "rank  DP")
    assert {row[4] for row in rows} >= {"1", "2"}
    assert all(int(row[1]) % int(row[4]) == 0 for row in rows)
    assert main(["tune", str(write(model=model)), *QUICK, "--expert", "2"]) == 0
    rows = table_under(capsys.readouterr().out, "rank  DP")
    assert {row[4] for row in rows} == {"2"}
    told = error_of(capsys, ["tune", write(), "--expert", "0"])
    assert told == "tune: expert-parallel size 0; need at least 1"


def test_hidden_exchanges_shorten_the_step(write, capsys):
    shown = []
    hidden = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    for optimizer in ({}, hidden):
        path = write(parallel={"pipeline": 2, "data": 2}, optimizer=optimizer)
        assert main(["emulate", str(path), *QUICK]) == 0
        rows = table_under(capsys.readouterr().out, "rank  ")
        shown.append([(float(row[7]), float(row[9])) for row in rows])
    for (whole, alone), (same, less) in zip(*shown, strict=True):
        assert whole == alone == same > less


def test_a_cache_file_spares_emulation_and_changes_nothing(write, tmp_path, capsys):
    path, cache = write(), tmp_path / "cache.json"
    outputs = []
    for _ in range(2):
        assert main(["emulate", str(path), *QUICK, "--cache", str(cache)]) == 0
        outputs.append(capsys.readouterr().out.partition("\nreuse: "))
    assert main(["emulate", str(path), *QUICK]) == 0
    without = capsys.readouterr().out.partition("\nreuse: ")
    assert outputs[0][0] == outputs[1][0] == without[0]
    found = [out.partition("\ncache: ")[2].split()[:3:2] for _, _, out in outputs]
    (none, asked), (all_of_them, as_many) = found
    assert none == "0"
    assert all_of_them == as_many == asked
    assert "cache: " not in without[2]


def changed(**changes: object) -> dict[str, object]:
    return {"model": {"name": "small", "modules": [{**VISION, **changes}, LANGUAGE]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "$: key 'format' is missing; add it ('pipeweaver.job/1')"),
        ({"format": "pipeweaver.job/2"}, "$.format: is 'pipeweaver.job/2'; this reader takes"),
        ({"device": None}, "$: key 'device' is missing; add it"),
        ({"colour": 1}, "$: unknown key 'colour'; remove it"),
        ({"model": None}, "$: give either 'setup' or 'model'"),
        ({"setup": "vlm-s"}, "$: give either 'setup' or 'model'"),
        ({"model": None, "setup": "vlm-q"}, "$.setup: no setup preset 'vlm-q'; there are ["),
        ({"device": "H9"}, "$.device: device "),
        ({"ranks": 0}, "$.ranks: is 0; it must be at least 1"),
        ({"parallel": {"tensor": 2}}, "$.parallel: key 'pipeline' is missing; add it"),
        ({"parallel": {"pipeline": 0}}, "$.parallel.pipeline: is 0; it must be at least 1"),
        ({"options": {"attention": "fast"}}, "$.options.attention: is 'fast'; it must be one of"),
        ({"strategies": []}, "$.strategies: must name at least one strategy, and each once"),
        ({"candidates": 1}, "$.candidates: is 1; it must be at least 2"),
        ({"strategies": ["forget"]}, "$.strategies[0]: is 'forget'; it must be one of ['keep',"),
        ({"segments": {"audio": 1}}, "$.segments: names ['audio']; it takes ['vision', 'lang"),
        ({"sub_microbatch": {"language": 1}}, "$.sub_microbatch: names ['language']; it takes"),
        (changed(layers=0), "$.model.modules[0].layers: is 0; it must be at least 1"),
        (changed(hidden_size=66), "$.model.modules[0]: module 'vision': hidden_size 66 is not a"),
        (changed(preset="vit-6b"), "$.model.modules[0].preset: no module preset 'vit-6b'; there"),
        (changed(name="audio"), "$.model: model 'small', module 'language': names must be"),
        (changed(layer={"window": 0}), "$.model.modules[0].layer.window: is 0; it must be at"),
        ({"batch": {}}, "$.batch: key 'microbatches' is missing; add it"),
        ({"batch": {"microbatches": []}}, "$.batch.microbatches: holds no microbatch; give at"),
        (
            {"batch": {"synthetic": "sounds", "microbatches": 1}},
            "$.batch.synthetic: is 'sounds'; it must be one of ['images', 'clips']",
        ),
        (
            {"batch": {"synthetic": "clips", "microbatches": 1}},
            "$.batch: has items of ['text']; model 'small' takes items of ['vision']",
        ),
        (
            {"batch": {"microbatches": [{"sequence_length": 1, "items": {"vision": [[1]]}}]}},
            "$.batch.microbatches[0].items.vision[0]: has 1 entries; write [units, tokens]",
        ),
        (
            {"batch": {"microbatches": [{"sequence_length": 4, "document_lengths": [5]}]}},
            "$.batch.microbatches[0]: microbatch: documents of 5 tokens do not fit",
        ),
    ],
    ids=str,
)
def test_bad_jobs_are_told_in_one_line(write, capsys, changes, message):
    path = write(**changes)
    for verb in ("emulate", "tune"):
        told = error_of(capsys, [verb, path])
        assert told.startswith(f"{path}: ")
        assert message in told


@pytest.mark.parametrize("verb", ["emulate", "tune"])
def test_unreadable_jobs_are_told_in_one_line(tmp_path, capsys, verb):
    assert "cannot be read" in error_of(capsys, [verb, tmp_path / "none.json"])
    path = tmp_path / "cut.json"
    path.write_bytes(b"{")
    assert "not readable JSON" in error_of(capsys, [verb, path])


def test_what_does_not_fit_is_told_in_one_line(write, capsys):
    path = write(model=None, setup="vlm-l", parallel={"pipeline": 1}, ranks=1)
    assert "weights, gradients and optimizer state take" in error_of(capsys, ["emulate", path])
    assert "use more ranks or a smaller model" in error_of(capsys, ["tune", path])


def test_microbatches_that_cannot_be_dealt_are_told(write, capsys):
    told = error_of(capsys, ["emulate", write(parallel={"pipeline": 1, "data": 3})])
    assert "2 microbatches cannot be dealt to 3" in told


def test_calibrate_writes_a_profile_and_prints_errors(tmp_path, capsys):
    path = tmp_path / "mine.json"
    sizes = ["16x32", "32x32", "32x64", "64x64"]
    argv = ["calibrate", "--device", "cpu", "-o", path, "--repeats", "1", "--sizes", *sizes]
    assert main([str(one) for one in argv]) == 0
    rows = table_under(capsys.readouterr().out, "operator class")
    assert {row[0] for row in rows} >= {"matmul", "attention", "norm", "softmax"}
    found = load_device(str(path))
    assert found.spec == load_device("cpu").spec
    assert found.factors != load_device("cpu").factors
    assert found.source.endswith("; calibrated")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cuda"], "calibrate: --device cuda needs --base, a profile such as H100"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device", "cpu", "--repeats", "0"], "calibrate: 0 repeats; need at least 1"),
        (["--device", "cpu", "--base", "H9"], "device 'H9': no such file, and the shipped"),
        (["--device", "cpu", "--sizes", "4"], "argument --sizes: is '4'; write two numbers as"),
        (["--device", "cpu", "--sizes", "4x4"], "calibration: 3 samples of matmul; give at least"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_calibrate_refuses_what_it_cannot_do(tmp_path, capsys, argv, message):
    assert error_of(capsys, ["calibrate", "-o", tmp_path / "x", *argv]).startswith(message)
    assert not os.listdir(tmp_path)  # noqa: PTH208


def test_calibrate_does_not_overwrite_its_base(tmp_path, capsys):
    path = tmp_path / "base.json"
    path.write_bytes(profile_to_json(load_device("cpu")))
    argv = ["calibrate", "--device", "cpu", "--base", path, "-o", path]
    assert "is read as well; name another file" in error_of(capsys, argv)


def test_cuda_is_refused_where_there_is_none(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    argv = ["calibrate", "--device", "cuda", "--base", "H100", "-o", tmp_path / "x"]
    assert "this machine has no CUDA device" in error_of(capsys, argv)
