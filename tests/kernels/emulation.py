"""Our CUDA kernels on a CPU: compiled by the host's C++ compiler against the emulator in `emulator/`.

`emulator/<op>.cpp` includes the op's kernels.cuh and exports C functions that launch them on buffers of the caller.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).with_name("emulator")
FLAGS = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
Mutation = tuple[str, str, str]
"""File below csrc, the text that stands there once, the text to stand there instead."""


def emulated(op: str, mutations: Sequence[Mutation] = ()) -> ctypes.CDLL:
    """The library of emulator/<op>.cpp; with mutations, made from a changed copy of csrc."""
    return _compiled(op, tuple(mutations))


@functools.cache
def _compiled(op: str, mutations: tuple[Mutation, ...]) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    assert compiler is not None, "no C++ compiler: the installation needs one, too"
    folder = Path(_folder().name) / f"{op}_{len(list(Path(_folder().name).iterdir()))}"
    folder.mkdir()
    source = ROOT / "csrc"
    if mutations:
        source = folder / "csrc"
        shutil.copytree(ROOT / "csrc", source)
    for name, old, new in mutations:
        text = (source / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        (source / name).write_text(text.replace(old, new))
    library = folder / f"{op}.so"
    command = [compiler, *FLAGS, '-DNOVA_EMULATOR="emulator.h"', "-I", source, "-I", EMULATOR]
    done = subprocess.run(
        [*command, EMULATOR / f"{op}.cpp", "-o", library], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(library))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
