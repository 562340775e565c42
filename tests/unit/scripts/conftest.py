"""The quickstart's modules, imported from where they lie."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).parents[3] / "scripts" / "quickstart"


@pytest.fixture(scope="session")
def digits() -> ModuleType:
    return _quickstart_module("digits")


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    return _quickstart_module("recipe")


def _quickstart_module(name: str) -> ModuleType:
    if str(QUICKSTART) not in sys.path:
        sys.path.insert(0, str(QUICKSTART))
    return importlib.import_module(name)
