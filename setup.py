"""Builds the native core (`megatron_pipeweaver._core`); everything else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_pipeweaver._core",
            sorted(str(path) for path in Path("megatron_pipeweaver/csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("megatron_pipeweaver/csrc").glob("*.hpp")),
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
