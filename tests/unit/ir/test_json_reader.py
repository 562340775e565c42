import os
import stat
import subprocess
import sys

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.json_reader import parse_json, read_bytes, write_whole


def refusal(read, text):
    with pytest.raises(ConfigError) as caught:
        read(parse_json(text.encode(), "f.json"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("f.json: ")
    return message.removeprefix("f.json: ")


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (lambda n: n.integer(), "-1", "$: is -1; it must be at least 0 and below 2**63"),
        (lambda n: n.integer(1), "0", "$: is 0; it must be at least 1 and below 2**63"),
        (
            lambda n: n.integer(),
            str(2**63),
            "$: is 9223372036854775808; it must be at least 0 and below 2**63",
        ),
        (
            lambda n: n.integer(),
            "9" * 100,
            f"$: is {'9' * 37}...; it must be at least 0 and below 2**63",
        ),
        (lambda n: n.integer(), "1.0", "$: is 1.0; it must be a whole number"),
        (lambda n: n.integer(), "1e3", "$: is 1000.0; it must be a whole number"),
        (lambda n: n.integer(), "true", "$: is true; it must be a whole number"),
        (lambda n: n.integer(), "NaN", "$: is NaN; it must be a whole number"),
        (lambda n: n.integer(), '"1"', '$: is "1"; it must be a whole number'),
        (lambda n: n.text(), "null", "$: is null; it must be a string"),
        (lambda n: n.text(), "[1,2]", "$: is an array of 2; it must be a string"),
        (
            lambda n: n.text(),
            r'"\ud800"',
            r'$: is "\ud800", half of a surrogate pair; write whole characters',
        ),
        (lambda n: n.boolean(), "1", "$: is 1; it must be true or false"),
        (lambda n: n.array(), "{}", "$: is an object of 0; it must be an array"),
        (lambda n: n.array(2), "[1]", "$: has 1 entries; it must have 2"),
        (lambda n: n.array()[1].text(), "[1,2]", "$[1]: is 2; it must be a string"),
        (lambda n: n.keys(frozenset("a")), "[]", "$: is an array of 0; it must be an object"),
        (lambda n: n.keys(frozenset("a")), "{}", "$: key 'a' is missing; add it"),
        (
            lambda n: n.keys(frozenset("a")),
            '{"a": 1, "b": 2}',
            "$: unknown key 'b'; remove it",
        ),
        (lambda n: n["a"]["b"].text(), '{"a": {"b": 1}}', "$.a.b: is 1; it must be a string"),
        (
            lambda n: n["a b\n"].text(),
            r'{"a b\n": 1}',
            r'$["a b\n"]: is 1; it must be a string',
        ),
    ],
)
def test_refusals_name_file_path_and_mend(read, text, message):
    assert refusal(read, text) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1,]",
        b"\xff\xfe",
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"a": 1, "a": 2}',
        b'{"\\ud800": 1}',
    ],
    ids=lambda data: str(data[:12]),
)
def test_what_is_no_json_is_refused_in_one_line(data):
    with pytest.raises(ConfigError, match=r"^f.json: not readable JSON \(.*\); write the file ag"):
        parse_json(data, "f.json")


def test_a_repeated_key_is_named():
    with pytest.raises(ConfigError, match="key 'a' stands twice in one object"):
        parse_json(b'[{"b": {"a": 1, "c": 2, "a": 1}}]', "f.json")


def test_values_come_back_as_plain_python():
    root = parse_json('{"i": 7, "t": "ü", "b": true, "a": [1]}'.encode(), "f.json")
    root.keys(frozenset("it"), optional=frozenset("bax"))
    assert (root["i"].integer(), root["t"].text(), root["b"].boolean()) == (7, "ü", True)
    assert [one.integer() for one in root["a"].array(1)] == [1]
    assert root.get("x") is None
    assert [key for key, _ in root.entries()] == ["i", "t", "b", "a"]


def test_build_tells_a_refusal_as_the_nodes():
    def make(value):
        raise ConfigError(f"{value} will not do")

    message = refusal(lambda n: n["a"].build(make, n["a"].integer()), '{"a": 3}')
    assert message == "$.a: 3 will not do"


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.json: cannot be read \(No such file"):
        read_bytes(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); check the path"):
        read_bytes(tmp_path)


def test_writing_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [one.name for one in path.parent.iterdir()] == ["b.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    write_whole(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"b.json: cannot be written \(No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["b.json"]


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    write_whole(path, b"old")

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["b.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_bytes(b"old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    write_whole(link, b"new")
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_bytes() == b"new"


def test_a_pipe_is_written_into_and_stays():
    code = (
        "from pathlib import Path\n"
        "from megatron_pipeweaver.ir.json_reader import write_whole\n"
        "write_whole(Path('/dev/stdout'), b'through')\n"
        "write_whole(Path('/dev/null'), b'away')\n"
        "assert Path('/dev/null').is_char_device()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout == b"through"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        write_whole(tmp_path, b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_whole(tmp_path / "file" / "below.json", b"x")
