"""The scripts' modules, imported from where they lie."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).parents[3] / "scripts" / "quickstart"


@pytest.fixture(scope="session")
def digits() -> ModuleType:
    return _module("digits")


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    return _module("recipe")


@pytest.fixture(scope="session")
def vlm_energon() -> ModuleType:
    return _module("vlm_energon", QUICKSTART.parent)


def _module(name: str, folder: Path = QUICKSTART) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
