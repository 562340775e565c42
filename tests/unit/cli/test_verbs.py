import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_pipeweaver.cli.main import main
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.ir.codec import (
    digest,
    schedule_from_json,
    schedule_to_json,
    trace_to_json,
)
from megatron_pipeweaver.search.baselines import BASELINES
from tests.unit.cli.test_main import error_of
from tests.unit.ir.examples import problem, trace

QUICK = ["--time-budget", "0.05"]


@pytest.fixture
def solved(problem_file, tmp_path, capsys):
    path = tmp_path / "schedule.json"
    assert main(["solve", str(problem_file), "-o", str(path), *QUICK]) == 0
    capsys.readouterr()
    return path


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.json"
    path.write_bytes(trace_to_json(trace()))
    return path


@pytest.mark.parametrize(
    "flags", [[], ["--no-split"], ["--deterministic"], ["--threads", "2", "--seed", "7"]]
)
def test_solve_writes_a_valid_schedule(problem_file, tmp_path, capsys, flags):
    path = tmp_path / "new" / "schedule.json"
    assert main(["solve", str(problem_file), "-o", str(path), *QUICK, *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    schedule = schedule_from_json(path.read_bytes())
    check_schedule(problem(), schedule, problem_sha256=digest(problem_file.read_bytes()))
    assert f"({schedule.makespan_ns} ns)" in out
    assert f"({schedule.lower_bound_ns} ns)" in out
    for word in ("gap", "bubble", "rank 1: ", "interleaved 1f1b", "encoders first", "jackson"):
        assert word in out
    split = [op for rank in schedule.ranks for op in rank if op.kind == "W"]
    assert not (split and "--no-split" in flags)


def test_an_interrupted_search_still_writes_the_best_so_far(problem_file, tmp_path):
    path = tmp_path / "schedule.json"
    argv = ["solve", str(problem_file), "-o", str(path), "--time-budget", "600", "-v"]
    command = [sys.executable, "-P", "-m", "megatron_pipeweaver", *argv]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stderr.readline()  # the search has a first schedule
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 0
    assert "pipeweaver: interrupted; this is the best found so far\n" in err
    schedule = schedule_from_json(path.read_bytes())
    check_schedule(problem(), schedule)
    assert f"({schedule.makespan_ns} ns)" in out


def test_solve_draws_too(problem_file, tmp_path):
    svg = tmp_path / "s.svg"
    argv = ["solve", problem_file, "-o", tmp_path / "s.json", "--svg", svg, *QUICK]
    assert main([str(one) for one in argv]) == 0
    assert svg.read_bytes().startswith(b"<svg ")
    assert b"Activation memory held" in svg.read_bytes()


def test_verify_says_ok(problem_file, solved, capsys):
    assert main(["verify", str(problem_file), str(solved)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"OK: {solved} is a valid schedule of {problem_file}\n")
    for word in ("makespan", "lower bound", "gap", "bubble", "peak memory"):
        assert word in out
    assert "claim" not in out


def test_verify_names_what_is_wrong(problem_file, solved, capsys):
    schedule = schedule_from_json(solved.read_bytes())
    solved.write_bytes(schedule_to_json(replace(schedule, makespan_ns=schedule.makespan_ns + 1)))
    assert "makespan_ns is" in error_of(capsys, ["verify", problem_file, solved])


def test_verify_refuses_another_problems_schedule(problem_file, solved, capsys):
    problem_file.write_bytes(problem_file.read_bytes() + b"\n")
    assert "problem_sha256" in error_of(capsys, ["verify", problem_file, solved])


def test_verify_does_not_take_a_bound_on_trust(problem_file, solved, capsys):
    schedule = schedule_from_json(solved.read_bytes())
    boast = replace(schedule, lower_bound_ns=schedule.makespan_ns)
    assert schedule.lower_bound_ns < schedule.makespan_ns
    solved.write_bytes(schedule_to_json(boast))
    assert main(["verify", str(problem_file), str(solved)]) == 0
    out = capsys.readouterr().out
    assert f"the file's claim; proven here: 0.000 ms ({schedule.lower_bound_ns} ns)" in out


def test_compare_prints_a_table(problem_file, capsys):
    assert main(["compare", str(problem_file), *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["schedule", "makespan", "/", "bound", "bubble", "peak", "memory"]
    names = [line[:16].strip() for line in lines[2:]]
    static = [name.replace("_", " ") for name in BASELINES]
    assert names == ["pipeweaver", *static, "contiguous 1F1B"]
    ratios = [float(line[16:].split()[2]) for line in lines[2:]]
    assert 1 <= ratios[0] <= min(ratios[1:-1])


def test_show_a_schedule(problem_file, solved, tmp_path, capsys):
    svg, chrome = tmp_path / "out.svg", tmp_path / "out.json"
    argv = ["show", solved, "--problem", problem_file, "-o", svg, "--chrome", chrome, "--text"]
    assert main([str(one) for one in [*argv, "--title", "A title"]]) == 0
    assert b"A title" in svg.read_bytes()
    assert json.loads(chrome.read_bytes())["traceEvents"]
    out = capsys.readouterr().out
    assert "makespan" in out
    assert "rank 0 | vision0.F0" in out or "rank 0 | language0.F1" in out


def test_show_a_trace(trace_file, solved, problem_file, tmp_path, capsys):
    svg, chrome = tmp_path / "out.svg", tmp_path / "out.json"
    argv = ["show", trace_file, "--problem", problem_file, "-o", svg, "--chrome", chrome]
    assert main([str(one) for one in [*argv, "--planned", solved, "--text"]]) == 0
    assert b'class="send"' in svg.read_bytes()
    assert json.loads(chrome.read_bytes())["otherData"]["iteration"] == 3
    out = capsys.readouterr().out
    assert "mean time of an op" in out
    assert "rank 0 | language0.F0\nrank 1 |\n" in out


def test_planned_goes_with_a_trace(solved, capsys):
    message = error_of(capsys, ["show", solved, "--planned", solved])
    assert message.endswith("is a schedule; --planned goes with a trace file")


def test_show_refuses_another_problem(problem_file, solved, tmp_path, capsys):
    problem_file.write_bytes(problem_file.read_bytes() + b"\n")
    argv = ["show", solved, "--problem", problem_file, "-o", tmp_path / "out.svg"]
    assert "$.problem_sha256: is not that of" in error_of(capsys, argv)
    assert not (tmp_path / "out.svg").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "$: key 'format' is missing; add one of"),
        (b'{"format": 3}', "$.format: is 3; it must be a string"),
        (b'{"format": "x"}', "$.format: is 'x'; it must be one of"),
        (b'{"format": "pipeweaver.trace/1"}', "$: key 'hosts' is missing; add it"),
        (b"[", "not readable JSON"),
    ],
)
def test_show_refuses_what_is_neither(tmp_path, capsys, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert message in error_of(capsys, ["show", path, "--text"])


def test_an_infeasible_problem_names_rank_and_bytes(infeasible_file, tmp_path, capsys):
    message = error_of(capsys, ["solve", infeasible_file, "-o", tmp_path / "s.json", *QUICK])
    assert "rank 1" in message
    assert not (tmp_path / "s.json").exists()
    assert "rank 1" in error_of(capsys, ["compare", infeasible_file, *QUICK])


@pytest.mark.parametrize("verb", ["solve", "verify", "compare", "show"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path, "cannot be read (No such file or directory); check the path"),
        (lambda path: path.mkdir(), "cannot be read (Is a directory); check the path"),
        (lambda path: path.write_bytes(b"{"), "not readable JSON"),
        (lambda path: path.write_bytes(b""), "not readable JSON"),
    ],
    ids=["missing", "folder", "corrupt", "empty"],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, verb, spoil, message):
    path, out = tmp_path / "in.json", tmp_path / "out"
    spoil(path)
    rest = {"solve": ["-o", out], "verify": [out], "compare": [], "show": ["--text"]}
    told = error_of(capsys, [verb, path, *rest[verb]])
    assert told.startswith(f"{path}: ")
    assert message in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("small.json", "is read as well; name another file"),
        ("", "is a folder; name a file in it"),
        ("small.json/below.json", "is not a writable folder)"),
    ],
)
def test_bad_outputs_are_refused_before_the_search(problem_file, capsys, output, message):
    before = problem_file.read_bytes()
    argv = ["solve", problem_file, "-o", problem_file.parent / output, "--time-budget", "1000"]
    assert message in error_of(capsys, argv)
    assert problem_file.read_bytes() == before


def test_two_outputs_need_two_names(problem_file, tmp_path, capsys):
    argv = ["solve", problem_file, "-o", tmp_path / "x", "--svg", tmp_path / "x"]
    assert error_of(capsys, argv).endswith("x: is written twice; name another file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(problem_file, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    argv = ["solve", problem_file, "-o", locked / "s.json", "--time-budget", "1000"]
    assert error_of(capsys, argv).endswith("locked is not a writable folder)")


def test_outputs_may_be_devices(problem_file):
    assert main(["solve", str(problem_file), "-o", os.devnull, *QUICK]) == 0
    assert not os.path.isfile(os.devnull)  # noqa: PTH113


def test_verbose_logs_to_stderr(problem_file, tmp_path, capsys):
    assert main(["solve", str(problem_file), "-o", str(tmp_path / "s"), *QUICK, "-v"]) == 0
    assert capsys.readouterr().err.startswith("pipeweaver: ")
