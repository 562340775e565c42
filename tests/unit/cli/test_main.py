import os
import subprocess
import sys

import pytest

from megatron_pipeweaver import __version__
from megatron_pipeweaver.cli import main as main_module
from megatron_pipeweaver.cli.main import VERBS, main
from megatron_pipeweaver.errors import InfeasibleError


def error_of(capsys, argv, code=2):
    """The one line that `argv` ends with."""
    assert main([str(one) for one in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pipeweaver: error: ")
    assert len(err.splitlines()) == 1
    return err.removeprefix("pipeweaver: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: VERB; see pipeweaver --help"),
        (["frobnicate"], "argument VERB: invalid choice: 'frobnicate'"),
        (["solve"], "the following arguments are required: problem, -o/--output; see pipeweaver s"),
        (
            ["solve", "p", "-o", "s", "--threads", "two"],
            "argument --threads: invalid int value: 't",
        ),
        (["solve", "p", "-o", "s", "--threads", "0"], "search: 0 threads; need at least 1"),
        (["solve", "p", "-o", "s", "--seed", "-1"], "search: seed is -1; need 0 <= seed < 2**63"),
        (["solve", "p", "-o", "s", "--time-budget", "nan"], "argument --time-budget: is 'nan'; g"),
        (["solve", "p", "-o", "s", "--time-budget", "-1"], "argument --time-budget: is '-1'; giv"),
        (["solve", "p", "-o", "s", "--max-rounds", "-2"], "search: max_rounds is -2; need >= 0"),
        (["solve", "p", "-o", "s", "--fast"], "unrecognized arguments: --fast; see pipeweaver"),
        (["verify", "p"], "the following arguments are required: schedule; see pipeweaver verify"),
        (["show", "p"], "nothing to show; add -o FILE.svg, --chrome FILE.json or --text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags_are_told_in_one_line(capsys, argv, message):
    assert error_of(capsys, argv).startswith(message)


@pytest.mark.parametrize("verb", [*VERBS, None])
def test_help_is_help(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"] if verb else ["--help"])
    assert ended.value.code == 0
    assert "usage: pipeweaver" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pipeweaver {__version__}\n"


class Raising:
    """A verb that ends with an exception."""

    HELP = "raise"

    def __init__(self, error):
        self.error = error

    def add_arguments(self, parser):
        pass

    def run(self, args):
        raise self.error


def test_interrupt_ends_with_130(capsys, monkeypatch):
    monkeypatch.setattr(main_module, "VERBS", {"x": Raising(KeyboardInterrupt())})
    assert error_of(capsys, ["x"], code=130) == "interrupted"


def test_every_kind_of_error_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(main_module, "VERBS", {"x": Raising(InfeasibleError("rank 0: too small"))})
    assert error_of(capsys, ["x"]) == "rank 0: too small"


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(main_module, "VERBS", {"x": Raising(ZeroDivisionError())})
    with pytest.raises(ZeroDivisionError):
        main(["x"])


def command(*argv):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return {
        "args": [sys.executable, "-m", "megatron_pipeweaver", *map(str, argv)],
        "stderr": subprocess.PIPE,
        "env": environment,
    }


def test_python_dash_m_runs_it():
    ran = subprocess.run(**command("verify"), stdout=subprocess.PIPE, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith(b"pipeweaver: error: the following arguments are required")


def test_a_reader_that_leaves_is_no_error(problem_file):
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(**command("compare", problem_file), stdout=write, check=False)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_output_is_told(problem_file):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        ran = subprocess.run(**command("compare", problem_file), stdout=full, check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        b"pipeweaver: error: the output cannot be written (No space left on device)\n"
    )
