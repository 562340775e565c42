"""The patches for forks: they fit what they name, and what does not fit says why."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import megatron.core
import pytest
from megatron.core.pipeline_parallel import schedules

REPO = Path(__file__).parents[3]
PATCHES = sorted((REPO / "patches").glob("*.patch"))
BASH = shutil.which("bash") or ""
SCHEDULES = "core/pipeline_parallel/schedules.py"
TOUCHED = (SCHEDULES, "training/arguments.py", "training/training.py")
WHEEL = Path(megatron.core.__file__).parents[1]
NEEDS_TRAINING = pytest.mark.skipif(
    find_spec("megatron.training") is None, reason="this megatron-core has no megatron.training"
)

pytestmark = pytest.mark.skipif(
    not (BASH and shutil.which("git")), reason="patches are applied with bash and git"
)


def apply(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, "scripts/apply_patches.sh", str(checkout)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def checkout_of(source: Path, folder: Path) -> Path:
    """A repository of the files that patches touch, as they lie in `source`'s ``megatron``."""
    for name in (*TOUCHED, "core/package_info.py"):
        if (source / name).is_file():
            (folder / "megatron" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / "megatron" / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "as it was")
    return folder


def patch_of_wheel() -> Path:
    version = ".".join(megatron.core.__version__.split(".")[:2])
    return next(path for path in PATCHES if path.name.startswith(f"core_v{version}."))


@NEEDS_TRAINING
def test_the_patch_fits_the_installed_megatron(tmp_path: Path) -> None:
    checkout = checkout_of(WHEEL, tmp_path)
    first, again = apply(checkout), apply(checkout)
    assert first.returncode == 0, first.stderr
    assert f"has {patch_of_wheel().name} now" in first.stdout
    assert again.returncode == 0
    assert "already" in again.stdout
    assert_only_our_lines(checkout)


def test_the_core_part_of_the_patch_fits_the_installed_core(tmp_path: Path) -> None:
    checkout = checkout_of(WHEEL, tmp_path)
    git(checkout, "apply", "--include", f"megatron/{SCHEDULES}", str(patch_of_wheel()))
    namespace: dict[str, object] = {
        "__name__": schedules.__name__,
        "__package__": schedules.__package__,
    }
    source = (checkout / "megatron" / SCHEDULES).read_text()
    exec(compile(source, "schedules.py", "exec"), namespace)
    choose = namespace["get_forward_backward_func"]
    plain = choose(pp_size=2, vp_size=2)  # type: ignore[operator]
    namespace["pipeweaver_schedule"] = lambda original: ("ours", original)
    assert choose(pp_size=2, vp_size=2) == ("ours", plain)  # type: ignore[operator]


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH is not set")
def test_the_patch_fits_a_checkout_of_megatron_lm(tmp_path: Path) -> None:
    checkout = checkout_of(Path(os.environ["MEGATRON_LM_PATH"]) / "megatron", tmp_path)
    ended = apply(checkout)
    assert ended.returncode == 0, ended.stderr
    assert_only_our_lines(checkout)


def assert_only_our_lines(checkout: Path) -> None:
    """Nothing of Megatron's is removed, and every added block speaks of PipeWeaver."""
    lines = git(checkout, "diff", "--unified=0").splitlines()
    changed = [one for one in lines if not one.startswith(("---", "+++"))]
    assert not [one for one in changed if one.startswith("-")]
    added = "\n".join(one[1:] for one in changed if one.startswith("+"))
    assert 0 < len(added.splitlines()) < 20
    assert "attach_pipeweaver(" in added
    assert "pipeweaver_schedule" in added


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    return line


def test_a_fork_that_changed_those_lines_is_told_where_and_left_alone(tmp_path: Path) -> None:
    checkout = checkout_of(WHEEL, tmp_path)
    patched = checkout / "megatron" / SCHEDULES
    changed = patched.read_text().replace("    return forward_backward_func\n", "    return own\n")
    patched.write_text(changed)
    line = refused(apply(checkout))
    assert f"{patch_of_wheel().name} does not fit {checkout}: " in line
    assert "schedules.py" in line
    assert patched.read_text() == changed


def test_another_version_is_told_which_patches_there_are(tmp_path: Path) -> None:
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 14\nPATCH = 0\n")
    line = refused(apply(tmp_path))
    assert "Megatron-LM 0.14, for which there is no patch" in line
    for path in PATCHES:
        assert path.stem in line


def test_another_folder_is_no_checkout(tmp_path: Path) -> None:
    assert "is no checkout of Megatron-LM" in refused(apply(tmp_path))
