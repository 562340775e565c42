"""What planning must not load, and who may call a plan verified."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_pipeweaver

PACKAGE = Path(megatron_pipeweaver.__file__).parent
HEAVY = ("torch", "megatron", "numpy", "transformer_engine", "apex")


@pytest.mark.parametrize(
    "modules",
    [
        ["megatron_pipeweaver"],
        ["megatron_pipeweaver.planner.planner", "megatron_pipeweaver.planner.wire"],
        ["megatron_pipeweaver.cli.main"],
        ["tests.unit.planner.examples"],
    ],
    ids=lambda modules: modules[0],
)
def test_planning_loads_neither_torch_nor_megatron(modules):
    script = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
roots = {{name.partition(".")[0] for name in sys.modules}}
print("loaded:", *sorted(roots & set({HEAVY})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded:"]


def calls_of(name: str, tree: ast.AST) -> list[int]:
    """The lines that call `name`, by itself or as an attribute."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and name in (getattr(node.func, "id", None), getattr(node.func, "attr", None))
    ]


def test_the_verifier_alone_makes_verified_plans():
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path, text in texts.items()
        if "VerifiedPlan" in text and calls_of("VerifiedPlan", ast.parse(text))
    }
    assert found == {"compiler/verify.py"}
