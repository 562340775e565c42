import logging
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.devices import load_device
from megatron_pipeweaver.semu.interface import Load, StageShape
from megatron_pipeweaver.semu.model import AnalyticCostModel
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.presets import module_preset
from megatron_pipeweaver.semu.reuse import DiskCache, Reuse
from megatron_pipeweaver.semu.work import OperatorClass

MODULE = module_preset("clip-vit-l-336")
STAGE = StageShape(layers=4, is_first=True, is_last=False)
LOAD = Load(sequence=576, batch=2, lengths=(576, 576))


def _strategy(time: int) -> tuple[int, ...]:
    return (time, 2 * time, 0)


def _refuse() -> tuple[int, ...]:
    raise AssertionError("this was to be found, not made")


def test_equal_requests_are_made_once() -> None:
    reuse = Reuse()
    assert [reuse.get(("a", 1), lambda: [7]) for _ in range(3)] == [[7]] * 3
    assert (reuse.hits, reuse.misses) == (2, 1)
    assert reuse.hit_rate == pytest.approx(2 / 3)


def test_disabled_reuse_makes_everything_anew() -> None:
    reuse = Reuse(enabled=False)
    assert reuse.get("a", lambda: 1) == 1
    assert reuse.get("a", lambda: 2) == 2
    assert reuse.hit_rate == 0.0


def test_models_of_different_devices_do_not_mix_in_one_reuse() -> None:
    reuse = Reuse()
    found = [
        AnalyticCostModel(load_device(name), RunOptions(), reuse=reuse).stage_strategies(
            MODULE, STAGE, LOAD
        )
        for name in ("H100", "A100", "H100")
    ]
    assert found[0] == found[2]
    assert found[0][0].forward_ns < found[1][0].forward_ns


def test_all_stages_of_equal_layers_are_one_to_emulate() -> None:
    model = AnalyticCostModel(load_device("H100"), RunOptions())
    middle = StageShape(layers=4, is_first=False, is_last=False, first_layer=4)
    later = StageShape(layers=4, is_first=False, is_last=False, first_layer=8)
    model.stage_strategies(MODULE, middle, LOAD)
    misses = model.reuse.misses
    model.stage_strategies(MODULE, later, LOAD)
    assert model.reuse.misses == misses


def test_another_run_finds_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.json"
    first = DiskCache(path)
    assert first.get("key", lambda: _strategy(5)) == _strategy(5)
    first.save()
    second = DiskCache(path)
    assert second.get("key", _refuse) == _strategy(5)
    assert (second.hits, second.misses) == (1, 0)


def test_writers_keep_what_others_have_added(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    one, other = DiskCache(path), DiskCache(path)
    one.get("a", lambda: _strategy(1))
    other.get("b", lambda: _strategy(2))
    one.save()
    other.save()
    both = DiskCache(path)
    assert both.get("a", _refuse) == _strategy(1)
    assert both.get("b", _refuse) == _strategy(2)
    assert {one.name for one in tmp_path.iterdir()} == {"cache.json", ".cache.json.lock"}


_WRITER = """
import sys
from pathlib import Path
from megatron_pipeweaver.semu.reuse import DiskCache
for number in range(20):
    cache = DiskCache(Path(sys.argv[1]))
    cache.get(f"{sys.argv[2]}:{number}", lambda: (number,))
    cache.save()
"""


def test_writers_at_once_lose_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.json"
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _WRITER, str(path), name])
        for name in "abc"
    ]
    with caplog.at_level(logging.WARNING):
        while any(writer.poll() is None for writer in writers):
            DiskCache(path)  # a reader meanwhile finds a whole file, or none
            time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert not caplog.records
    found = DiskCache(path)
    for name in "abc":
        for number in range(20):
            assert found.get(f"{name}:{number}", _refuse) == (number,)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "cache.json")
    cache.get("a", lambda: _strategy(1))
    with pytest.raises(ConfigError, match=r"cannot be written .*; name another file"):
        cache.save()


@pytest.mark.parametrize("damage", ["cut", "digit", "text", "format"])
def test_damaged_files_are_left_out_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "cache.json"
    cache = DiskCache(path)
    cache.get("key", lambda: _strategy(5))
    cache.save()
    data = path.read_bytes()
    changed = {
        "cut": data[:-20],
        "digit": data.replace(b"[5,", b"[6,"),
        "text": b"\xff\xfe",
        "format": data.replace(b"semu_cache/2", b"semu_cache/9"),
    }
    assert changed[damage] != data
    path.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        again = DiskCache(path)
    assert "cache" in caplog.text
    assert again.get("key", lambda: _strategy(7)) == _strategy(7)
    again.save()
    assert DiskCache(path).get("key", _refuse) == _strategy(7)


def test_models_share_subgraphs_through_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    disk = DiskCache(path)
    first = AnalyticCostModel(load_device("H100"), RunOptions(), disk=disk)
    expected = first.stage_strategies(MODULE, STAGE, LOAD)
    disk.save()
    found = DiskCache(path)
    second = AnalyticCostModel(load_device("H100"), RunOptions(), disk=found)
    assert second.stage_strategies(MODULE, STAGE, LOAD) == expected
    assert (found.hits, found.misses) == (disk.misses, 0)
    other = DiskCache(path)
    AnalyticCostModel(load_device("A100"), RunOptions(), disk=other).stage_strategies(
        MODULE, STAGE, LOAD
    )
    assert (other.hits, other.misses) == (0, disk.misses)


def test_own_rules_are_not_cached_on_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be cached"):
        AnalyticCostModel(
            load_device("H100"),
            RunOptions(),
            rules={OperatorClass.MATMUL: lambda operator, phase: 1},
            disk=DiskCache(tmp_path / "cache.json"),
        )


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    cache = DiskCache(path)
    cache.get("first", lambda: _strategy(7))
    cache.save()
    for number in range(200):
        cache.get(f"key {number}", lambda: _strategy(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            cache.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert DiskCache(path).get("first", _refuse) == _strategy(7)
    cache.save()  # there is room again, and nothing was lost
    assert DiskCache(path).get("key 3", _refuse) == _strategy(1)


_KILLED = """
import fcntl, os, signal, sys
from megatron_pipeweaver.semu import reuse

def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # the lock is held, and the new file half written

reuse.os.fdopen = die
cache = reuse.DiskCache(reuse.Path(sys.argv[1]))
cache.get("lost", lambda: (1,))
cache.save()
"""


def test_a_writer_that_is_killed_leaves_the_file_and_the_lock_to_others(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    cache = DiskCache(path)
    cache.get("kept", lambda: _strategy(1))
    cache.save()
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(path)], timeout=60, check=False)
    assert killed.returncode == -9
    other = DiskCache(path)
    other.get("new", lambda: _strategy(2))
    other.save()
    found = DiskCache(path)
    assert found.get("kept", _refuse) == _strategy(1)
    assert found.get("new", _refuse) == _strategy(2)


def test_a_folder_in_place_of_a_cache_is_refused_before_anything_is_emulated(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        DiskCache(tmp_path)
