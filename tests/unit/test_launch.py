"""The launcher's own refusals; what it does for a script is tested with ranks."""

import subprocess
import sys

import pytest

from megatron_pipeweaver.launch import main


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "no script"), (["missing.py"], "missing.py: no such script")]
)
def test_without_a_script_it_says_how_it_is_used(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "python -m megatron_pipeweaver.launch SCRIPT.py" in line


def test_one_rank_speaks_for_all(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main([]) == 2
    assert not capsys.readouterr().err


def test_what_cannot_work_ends_a_script_with_two_in_one_line(tmp_path):
    pytest.importorskip("megatron.training", reason="this megatron-core has no megatron.training")
    script = tmp_path / "script.py"
    script.write_text(
        "from megatron.training.arguments import parse_and_validate_args\n"
        "parse_and_validate_args()\n"
        "raise SystemExit('not refused')\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_pipeweaver.launch", str(script)),
            *("--pipeweaver", "--pipeline-model-parallel-size", "2"),
            *("--recompute-granularity", "full"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    refusal = [line for line in done.stderr.splitlines() if "megatron_pipeweaver.launch:" in line]
    assert len(refusal) == 1
    assert "--recompute-granularity full with --pipeweaver" in refusal[0]


def test_a_megatron_without_training_is_refused_by_name(tmp_path, capsys, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('was run')\n")
    monkeypatch.setattr("megatron_pipeweaver.plugin.training.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("RANK", raising=False)
    assert main([str(script)]) == 2
    assert "megatron.training cannot be imported" in capsys.readouterr().err
