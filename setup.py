"""Packages, and the C++ extension built by CMake. Metadata and tools are in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds CMakeLists.txt, once, and installs into the folder where setuptools expects the extensions."""

    def build_extension(self, ext: Extension) -> None:
        if ext.optional:  # built with the other one, where a CUDA compiler is
            return
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=tools)
        if cmake is None:
            raise RuntimeError("cmake was not found: install it with `pip install cmake`")
        ninja = shutil.which("ninja", path=tools)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        build = ROOT / self.build_temp / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [cmake, "-S", ROOT, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build, "--parallel"], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", target], check=True)


setup(
    packages=find_packages(include=["nova_sys*"]) + find_packages("kernels"),
    package_dir={"nova_kernels": "kernels/nova_kernels"},
    ext_modules=[
        Extension("nova_kernels._C", sources=[]),
        Extension("nova_kernels._C_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
