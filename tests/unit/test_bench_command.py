"""`nova bench` hands its arguments to the programs of the source tree, and says what is missing where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from nova_sys import bench, cli


@pytest.mark.parametrize(
    ("argv", "program", "handed_on"),
    [
        (["--op", "packing", "--repeats", "2"], "run.py", ["--op", "packing", "--repeats", "2"]),
        (["--all", "--out", "D", "--minutes", "8"], "gpu_check.py", ["--out", "D", "--minutes", "8"]),
        (["--minutes", "8", "--all"], "gpu_check.py", ["--minutes", "8"]),
    ],
)  # fmt: skip
def test_arguments_are_handed_on(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], program: str, handed_on: list[str]
) -> None:
    ran: list[Any] = []

    def run(command: list[Any], *, env: dict[str, str]) -> SimpleNamespace:
        ran.append((command, env))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    assert CliRunner().invoke(cli.app, ["bench", *argv]).exit_code == 3
    ((command, environment),) = ran
    assert command == [sys.executable, bench.ROOT / "benchmarks" / program, *handed_on]
    assert str(bench.ROOT / "kernels") in environment["PYTHONPATH"].split(":")


def test_without_a_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"installed without its source tree; run `pip install -e"):
        bench.run_benchmark(["--op", "packing"], whole_machine=False)
