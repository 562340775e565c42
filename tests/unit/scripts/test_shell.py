"""The shell scripts say plainly what is missing. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]
TOOLS = ("cat", "cksum", "dirname", "mktemp", "rm", "sed", "sort", "tail", "tr", "uname")
BASH = shutil.which("bash") or ""

pytestmark = pytest.mark.skipif(not BASH, reason="no bash")


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder of programs, without any Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")
    return folder


def add_program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!{BASH}\n{text}\n")
    (folder / name).chmod(0o755)


def run_bash(
    *command: str, path: Path | str, home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, *command],
        env={"PATH": str(path), "HOME": str(home), **variables},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_no_python_is_said_plainly(script: str, bare_path: Path, tmp_path: Path) -> None:
    ended = run_bash(str(REPO / "scripts" / script), path=bare_path, home=tmp_path)
    assert ended.returncode == 2
    for version in ("3.11", "3.12"):
        assert f"Python {version}: not on PATH and not under pyenv" in ended.stderr


def check_gpu(tmp_path: Path, bare_path: Path, **answers: str) -> tuple[int, dict[str, str]]:
    """`gpu_check.sh` with a Python that plays torch; its exit code, and the summary by part."""
    lines = [
        f'case "$*" in *"{asked}"*) echo {answer}; exit ;; esac'
        for asked, answer in (
            ("device_count", answers.get("gpus", "1")),
            ("nccl.version", answers.get("nccl", "2 31 1")),
            ("found_device", "H100"),
            ("tests/gpu", answers.get("tests", "all passed")),
            ("benchmarks", "ran"),
        )
    ]
    add_program(tmp_path / "env/bin", "python", "\n".join(lines))
    for tool in ("bash", "mkdir", "tee"):
        (bare_path / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")
    results = tmp_path / "results"
    ended = run_bash(
        str(REPO / "scripts/gpu_check.sh"),
        str(tmp_path / "env"),
        path=bare_path,
        home=tmp_path,
        PIPEWEAVER_GPU_RESULTS=str(results),
    )
    lines = (results / "summary.txt").read_text().splitlines()
    return ended.returncode, dict(one.split(": ", 1) for one in lines)


def test_of_a_gpu_all_is_checked_that_can_be_and_the_rest_is_told(
    bare_path: Path, tmp_path: Path
) -> None:
    code, summary = check_gpu(tmp_path, bare_path)
    assert code == 0
    assert (summary["tests"], summary["accuracy"]) == ("ran", "ran")
    assert summary["pipeline"].startswith("skipped: nvidia-cuda-mps-control is not installed")


@pytest.mark.parametrize(
    ("answers", "code", "part", "told"),
    [
        ({"nccl": "2 28 3"}, 0, "pipeline", "skipped: NCCL 2.28 refuses ranks"),
        ({"gpus": "4", "nccl": "2 28 3"}, 0, "pipeline", "ran"),
        ({"tests": "failed; exit 1"}, 1, "tests", "failed: see tests.log"),
    ],
)
def test_what_a_gpu_check_left_out_is_said(
    bare_path: Path, tmp_path: Path, answers: dict[str, str], code: int, part: str, told: str
) -> None:
    found, summary = check_gpu(tmp_path, bare_path, **answers)
    assert found == code
    assert summary[part].startswith(told)
    assert summary["accuracy"] == "ran"


def test_a_daemon_of_our_own_is_ended(bare_path: Path, tmp_path: Path) -> None:
    add_program(
        bare_path,
        "nvidia-cuda-mps-control",
        f'cat >>"{tmp_path}/told"; echo "$*" >>"{tmp_path}/told"',
    )
    code, summary = check_gpu(tmp_path, bare_path)
    assert code == 0
    assert summary["pipeline"] == "ran"
    assert (tmp_path / "told").read_text().split() == ["-d", "quit"]


def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path: Path) -> None:
    add_program(tmp_path / "env/bin", "python", "exit 1")
    ended = run_bash(
        str(REPO / "scripts/gpu_check.sh"),
        str(tmp_path / "env"),
        path=os.environ["PATH"],
        home=tmp_path,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "no GPU: torch.cuda.is_available() is false" in line


def test_another_python_does_not_do(bare_path: Path, tmp_path: Path) -> None:
    add_program(bare_path, "python3", "exit 1")
    ended = run_bash(str(REPO / "scripts/test.sh"), "3.12", path=bare_path, home=tmp_path)
    assert ended.returncode == 2
    assert "Python 3.12: not on PATH" in ended.stderr
    assert "3.11" not in ended.stderr


def test_python_without_headers_is_said_plainly(bare_path: Path, tmp_path: Path) -> None:
    add_program(bare_path, "python3.11", "echo /usr/bin/python3.11 /usr/include/Python.h")
    ended = run_bash(str(REPO / "scripts/test.sh"), "3.11", path=bare_path, home=tmp_path)
    assert ended.returncode == 2
    assert "/usr/bin/python3.11 lacks /usr/include/Python.h" in ended.stderr


@pytest.mark.parametrize("where", ["home", "variable", "shims"])
def test_python_under_pyenv_is_found(where: str, bare_path: Path, tmp_path: Path) -> None:
    root = tmp_path / (".pyenv" if where == "home" else "elsewhere")
    program = root / "versions" / "3.12.7" / "bin" / "python3.12"
    add_program(program.parent, program.name, f"echo {program}")
    ended = run_bash(
        "-c",
        f'source {REPO}/scripts/lib.sh; find_python 3.12; echo "$PYTHON"',
        path=f"{bare_path}:{root / 'shims'}" if where == "shims" else bare_path,
        home=tmp_path,
        **({"PYENV_ROOT": str(root)} if where == "variable" else {}),
    )
    assert ended.stdout.strip() == str(program), ended.stderr


def test_the_running_python_is_taken_for_what_it_is(bare_path: Path, tmp_path: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    (bare_path / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    ended = run_bash(
        "-c",
        f"source {REPO}/scripts/lib.sh; inspect_python python3 {version} && "
        "! inspect_python python3 2.7",
        path=bare_path,
        home=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(bare_path / "python3"))


def test_no_compiler_is_said_plainly(bare_path: Path, tmp_path: Path) -> None:
    ended = run_bash(
        "-c", f"source {REPO}/scripts/lib.sh; need_compiler", path=bare_path, home=tmp_path
    )
    assert ended.returncode == 2
    assert "no C++20 compiler: 'c++' is missing or too old" in ended.stderr


def test_unknown_version_shows_the_usage(bare_path: Path, tmp_path: Path) -> None:
    ended = run_bash(str(REPO / "scripts/test.sh"), "3.10", path=bare_path, home=tmp_path)
    assert ended.returncode == 2
    assert "usage: bash scripts/test.sh" in ended.stderr


def test_output_is_shown_only_on_failure(tmp_path: Path) -> None:
    ended = run_bash(
        "-c",
        f"source {REPO}/scripts/lib.sh; quietly one echo seen-not; "
        "quietly two bash -c 'echo seen; exit 3'",
        path=os.environ["PATH"],
        home=tmp_path,
    )
    assert ended.returncode == 1
    assert "seen-not" not in ended.stdout + ended.stderr
    assert "seen\n" in ended.stderr
