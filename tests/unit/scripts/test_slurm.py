"""The job scripts of `scripts/slurm` under a stub of SLURM; one node really trains, on CPU."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_pipeweaver.semu.presets import SETUPS
from tests.photographs import make_dataset

REPO = Path(__file__).parents[3]
JOBS = sorted(path.name for path in (REPO / "scripts" / "slurm").glob("*.sbatch"))
BASH = shutil.which("bash") or ""

SBATCH = """
# As SLURM does: the script is copied, and runs with its reservation in variables.
script=$1; shift
cp "$script" "$SPOOL/slurm_script"
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
export SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=$nodes SLURM_JOB_NODELIST=cluster SLURM_SUBMIT_DIR=$PWD
exec bash "$SPOOL/slurm_script" "$@"
"""
SRUN = """
printf '%s\\n' "${WORLD_SIZE:+WORLD_SIZE=$WORLD_SIZE }$*" >>"$SPOOL/steps"
while case $1 in --*) true ;; *) false ;; esac; do shift 2; done
[ -n "${EXECUTE:-}" ] || exit "${EXIT_CODE:-0}"
exec "$@"
"""
SMALL = shlex.split(
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--no-masked-softmax-fusion --encoder-num-layers 2 --vision-hidden-size 16 "
    "--vision-ffn-hidden-size 32 --vision-num-attention-heads 2 --img-h 8 --img-w 8 --patch-dim 2 "
    "--max-images 3 --decoder-num-layers 2 --hidden-size 32 --ffn-hidden-size 32 "
    "--num-attention-heads 8 --vocab-size 256 --make-vocab-size-divisible-by 32 --seq-length 192 "
    "--max-position-embeddings 192 --pipeline-model-parallel-size 2 --use-cpu-initialization "
    "--global-batch-size 2 --train-iters 2 --eval-interval 2 --lr-warmup-iters 0 --num-workers 0 "
    "--eval-iters 0 --packing-buffer 8 --pipeweaver-search-seconds 0.05 "
    "--pipeweaver-fallback wait"
)

pytestmark = pytest.mark.skipif(not BASH, reason="no bash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How a job ended, and the steps that it asked SLURM for."""

    code: int
    output: str
    steps: list[str]


def submit(job: str, *arguments: str, folder: Path, **variables: str) -> Job:
    programs, spool = folder / "bin", folder / "spool"
    for one in (programs, spool):
        one.mkdir()
    stubs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": "echo localhost\necho more"}
    for name, text in stubs.items():
        (programs / name).write_text(f"#!{BASH}\n{text}")
        (programs / name).chmod(0o755)
    ended = subprocess.run(
        ["sbatch", f"scripts/slurm/{job}", *arguments],
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SPOOL": str(spool),
            "PIPEWEAVER_PYTHON": sys.executable,
            "PYTHONWARNINGS": "ignore",
            **variables,
        },
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    steps = spool / "steps"
    return Job(
        code=ended.returncode,
        output=ended.stdout + ended.stderr,
        steps=steps.read_text().splitlines() if steps.exists() else [],
    )


def flag(step: str, name: str) -> str:
    """The last value of a flag, which is the one that counts."""
    words = shlex.split(step)
    return words[max(index for index, word in enumerate(words) if word == f"--{name}") + 1]


@pytest.mark.parametrize("job", JOBS)
def test_a_job_plans_on_one_process_and_then_trains_on_all_nodes(job: str, tmp_path: Path) -> None:
    ended = submit(job, "--lr", "7e-5", folder=tmp_path)
    assert ended.code == 0, ended.output
    planned, trained = ended.steps
    nodes = int(flag(trained, "nnodes"))
    assert planned.startswith(f"WORLD_SIZE={8 * nodes} --nodes 1 --ntasks 1 ")
    assert flag(planned, "pipeweaver-dry-run") == "2"
    assert trained.startswith(f"--nodes {nodes} --ntasks {nodes} --ntasks-per-node 1 ")
    assert flag(trained, "nproc-per-node") == "8"
    assert flag(trained, "rdzv-endpoint") == "localhost:20007"
    assert "--pipeweaver-dry-run" not in trained
    assert flag(planned, "lr") == flag(trained, "lr") == "7e-5"


@pytest.mark.parametrize("name", ["vlm-s", "vlm-m", "vlm-l"])
def test_jobs_of_the_paper_train_its_models_on_its_gpus(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    step = submit(f"{name.replace('-', '_')}.sbatch", folder=tmp_path).steps[1]
    vision, language = setup.model.modules
    sizes = setup.parallel
    assert 8 * int(flag(step, "nnodes")) == sizes.tensor * sizes.pipeline * sizes.data
    assert flag(step, "tensor-model-parallel-size") == str(sizes.tensor)
    assert flag(step, "pipeline-model-parallel-size") == str(sizes.pipeline)
    expected = {
        "encoder-num-layers": vision.layers,
        "vision-hidden-size": vision.hidden_size,
        "vision-ffn-hidden-size": vision.ffn_hidden_size,
        "vision-num-attention-heads": vision.attention_heads,
        "patch-dim": vision.patch_size,
        "decoder-num-layers": language.layers,
        "hidden-size": language.hidden_size,
        "ffn-hidden-size": language.ffn_hidden_size,
        "num-attention-heads": language.attention_heads,
        "num-query-groups": language.kv_groups,
    }
    assert {each: int(flag(step, each)) for each in expected} == expected
    assert int(flag(step, "spatial-merge-size")) ** 2 == vision.patches_per_token
    assert int(flag(step, "vocab-size")) + 1 == language.vocab_size  # and the end of a document


@pytest.mark.parametrize("name", ["t2v-s", "t2v-l"])
def test_jobs_of_videos_train_the_papers_models(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    step = submit(f"{name.replace('-', '_')}.sbatch", folder=tmp_path).steps[1]
    text, video = setup.model.modules
    sizes = setup.parallel
    assert "scripts/pretrain_t2v.py" in step
    assert 8 * int(flag(step, "nnodes")) == sizes.tensor * sizes.pipeline * sizes.data
    assert flag(step, "tensor-model-parallel-size") == str(sizes.tensor)
    assert flag(step, "pipeline-model-parallel-size") == str(sizes.pipeline)
    expected = {
        "encoder-num-layers": text.layers,
        "text-hidden-size": text.hidden_size,
        "text-ffn-hidden-size": text.ffn_hidden_size,
        "text-num-attention-heads": text.attention_heads,
        "text-num-query-groups": text.kv_groups,
        "decoder-num-layers": video.layers,
        "hidden-size": video.hidden_size,
        "ffn-hidden-size": video.ffn_hidden_size,
        "num-attention-heads": video.attention_heads,
        "patch-dim": video.patch_size,
        "latent-channels": video.image_channels,
    }
    assert {each: int(flag(step, each)) for each in expected} == expected
    assert flag(step, "modulation") == video.layer.modulation
    assert int(flag(step, "vocab-size")) + 1 == text.vocab_size  # and the end of a document


def test_a_dry_run_that_fails_ends_the_job(tmp_path: Path) -> None:
    ended = submit("one_node.sbatch", folder=tmp_path, EXIT_CODE="2")
    assert ended.code == 2
    assert len(ended.steps) == 1


def test_a_script_that_is_not_submitted_says_so(tmp_path: Path) -> None:
    path = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    ended = subprocess.run(
        [BASH, "-c", "source scripts/slurm/common.sh"],
        env=path,
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert "submit with sbatch, from the root of the checkout" in ended.stderr


@pytest.mark.skipif(
    find_spec("megatron.training") is None, reason="this megatron-core has no megatron.training"
)
def test_one_node_plans_and_trains_on_photographs(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "photographs")
    traces = tmp_path / "traces"
    ended = submit(
        "one_node.sbatch",
        *(*SMALL, "--pipeweaver-trace-dir", str(traces), "--energon", str(dataset)),
        folder=tmp_path,
        EXECUTE="yes",
        GPUS_PER_NODE="2",
    )
    assert ended.code == 0, ended.output
    planned = ended.output.find("room for activations, by pipeline rank")
    trained = ended.output.find("iteration        2/       2")
    assert 0 <= planned < trained, ended.output
    assert len(list(traces.iterdir())) >= 2
