import json
from pathlib import Path

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.devices import (
    Factors,
    load_device,
    profile_from_json,
    profile_to_json,
    shipped_devices,
)
from megatron_pipeweaver.semu.work import OperatorClass


def test_shipped_devices_are_valid_and_say_where_they_are_from() -> None:
    assert {"A100", "B200", "H100", "H20", "H200", "H800", "cpu"} <= set(shipped_devices())
    for name in shipped_devices():
        profile = load_device(name)
        assert profile.spec.name == name
        assert profile.source


def test_names_are_found_in_any_case() -> None:
    assert load_device("h100") == load_device("H100")


def test_files_round_trip(tmp_path: Path) -> None:
    profile = load_device("H800")
    path = tmp_path / "mine.json"
    path.write_bytes(profile_to_json(profile))
    assert load_device(str(path)) == profile


def test_unknown_device_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"'nope'.*no such file.*'H100'"):
        load_device("nope")


def _broken(**changes: object) -> bytes:
    value = json.loads(profile_to_json(load_device("cpu")))
    value.update(changes)
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "pipeweaver.device/9"}, "pipeweaver.device/1"),
        ({"extra": 1}, "extra"),
        ({"factors": {"magic": {}}}, "no operator class"),
        ({"factors": {"matmul": {"compute_permille": 0}}}, "compute_permille is 0"),
        ({"factors": {"matmul": {"half_sizes": [1, 2]}}}, "must have 3"),
        ({"spec": {}}, "missing"),
    ],
)
def test_broken_files_are_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        profile_from_json(_broken(**changes), "mine.json")


def test_classes_without_factors_reach_the_data_sheet() -> None:
    value = json.loads(profile_to_json(load_device("cpu")))
    value["factors"] = {}
    profile = profile_from_json(json.dumps(value).encode(), "mine.json")
    assert profile.factors_of(OperatorClass.MATMUL) == Factors()
