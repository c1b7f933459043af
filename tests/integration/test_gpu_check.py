"""benchmarks/gpu_check.py where there is no GPU: the whole chain with tiny shapes, and what it does with parts that fail."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    path = ROOT / "benchmarks" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real one")
def test_simulated(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu_check.py",
        "--simulate",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_check.json").read_text()
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    for op in ("kv_shift_rope", "packed_attention", "linear_dpo"):
        rows = parts[f"time {op}"]["result"]["results"]
        assert all(row["forward_backward"]["ms"] > 0 for row in rows), rows
        compared = [row["differs_by"] for row in rows if "differs_by" in row]
        assert "triton" in {row["provider"].split(",")[0] for row in rows} and compared
        assert max(compared) < 0.01  # of bf16
    tuned = parts["tune linear_dpo"]["result"]["results"]
    assert len(tuned) == 10 and all(row["forward"]["ms"] > 0 for row in tuned)
    step = parts["step reference"]["result"]
    assert abs(step["first_loss"] - math.log(2)) < 1e-5
    assert step["median"]["tokens_per_s"] > 0 and len(step["step_time_s"]) == 2


def test_parts_that_fail_are_told_and_do_not_stop_the_rest(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1.0)

    def part(name: str, code: str, *needs: str, seconds: float = 60.0, tool: str = "") -> object:
        return gpu_check.Part(name, seconds, [sys.executable, "-c", code, "{out}"], needs, tool)

    write = "import sys; open(sys.argv[1], 'w').write('[1, 2]')"
    said: list[str] = []
    chosen = [
        part("red", f"{write}; print('why'); sys.exit(3)"),
        part("behind red", write, "red"),
        part("slow", "import time; time.sleep(99)", seconds=2.0),
        part("no tool", write, tool="no-such-program"),
        part("green", write),
    ]
    done = gpu_check.check(chosen, tmp_path, 1.0, said.append)
    assert done == json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]
    assert done["red"]["status"] == "exit code 3" and done["red"]["result"] == [1, 2]
    assert "why" in done["red"]["log"]
    assert done["behind red"] == {"status": "skipped: needs red"}
    assert done["slow"]["status"] == "stopped after 2 s"
    assert done["no tool"] == {"status": "skipped: no-such-program is not there"}
    assert done["green"]["status"] == "ok" and len(said) == 5
    late = gpu_check.check(chosen[-1:], tmp_path, 0.01, said.append)
    assert late["green"] == {"status": "skipped: no time left"}
