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
    return script_module("digits")


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    return script_module("recipe")


@pytest.fixture(scope="session")
def vlm_energon() -> ModuleType:
    return script_module("vlm_energon", QUICKSTART.parent)


def script_module(name: str, folder: Path = QUICKSTART) -> ModuleType:
    """A module of the scripts, as a script beside it would import it."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
