"""`nova bench`: the programs of the source tree's benchmarks/, which no wheel installs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nova_sys

ROOT = Path(nova_sys.__file__).resolve().parents[1]


def run_benchmark(argv: Sequence[str], *, whole_machine: bool) -> int:
    """Runs benchmarks/gpu_check.py or benchmarks/run.py with these arguments; returns its exit code.

    Raises: ValueError where the package has no source tree beside it.
    """
    program = ROOT / "benchmarks" / ("gpu_check.py" if whole_machine else "run.py")
    if not program.is_file():
        raise ValueError(
            f"nova bench: {program} is not there, because this nova was installed without its source tree; "
            "run `pip install -e .` in a clone of the repository, and nova bench from there"
        )
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, program, *argv], env=environment).returncode
