"""benchmarks/gpu_check.py where there is no GPU: the whole chain with tiny shapes, and what it does with parts that fail."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv" / "peer-trl" / "bin" / "python"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real one")
def test_simulated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nova_sys.cli", "bench", "--all", "--simulate"]
    command += ["--minutes", "30"]  # however busy the machine is
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"NOVA_PEER_PYTHON": str(PEER)} if PEER.exists() else {}
    done = subprocess.run(
        [*command, "--out", tmp_path], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_check.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    for op in ("kv_shift_rope", "packed_attention", "linear_dpo"):
        rows = parts[f"time {op}"]["result"]["results"]
        assert all(row["forward_backward"]["ms"] > 0 for row in rows), rows
        compared = [row["differs_by"] for row in rows if "differs_by" in row]
        assert "triton" in {row["provider"].split(",")[0] for row in rows} and compared
        assert max(compared) < 0.01  # of bf16
    assert parts["test"]["result"]["counts"]["passed"] >= 1
    assert parts["small kv_shift_rope"]["result"] == {"finite": {"reference": True}}
    for name in ("step bf16", "step bf16, long documents"):
        rows = parts[name]["result"]["results"]
        assert [row["name"] for row in rows] == [
            "all in reference",
            "nothing shared",
            "keys and values shifted",
        ]
        assert all(row["pairs_per_s"] > 0 and len(row["step_time_s"]["all"]) == 3 for row in rows)
        assert abs(rows[0]["first_loss"] - math.log(2)) < 1e-5
    trl = parts["step TRL with Liger"]
    if PEER.exists():
        assert abs(trl["result"]["best"]["first_loss"] - math.log(2)) < 1e-5
        assert trl["result"]["ours_times_trl"] > 0
    else:
        assert trl["status"].startswith("skipped: trl")


def test_parts_that_fail_are_told_and_do_not_stop_the_rest(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1.0)

    def part(name: str, code: str, *needs: str, seconds: float = 60.0, tool: str = "") -> object:
        return gpu_check.Part(name, seconds, [sys.executable, "-c", code, "{out}"], needs, tool)

    write = "import sys; open(sys.argv[1], 'w').write('{}')"
    skip = write.replace("{}", '{"skipped": "no such package"}')
    said: list[str] = []
    chosen = [
        part("red", f"{write}; print('why'); sys.exit(3)"),
        part("behind red", write, "red"),
        part("slow", "import time; time.sleep(99)", seconds=2.0),
        part("no tool", write, tool="no-such-program"),
        part("no package", skip),
        part("green", write),
    ]
    done = gpu_check.check(chosen, tmp_path, 1.0, said.append)
    assert done == json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]
    assert done["red"]["status"] == "exit code 3" and done["red"]["result"] == {}
    assert "why" in done["red"]["log"]
    assert done["behind red"] == {"status": "skipped: needs red"}
    assert done["slow"]["status"] == "stopped after 2 s"
    assert done["no tool"] == {"status": "skipped: no-such-program is not there"}
    assert done["no package"]["status"] == "skipped: no such package"
    assert done["green"]["status"] == "ok" and len(said) == 6
    late = gpu_check.check(chosen[-1:], tmp_path, 0.01, said.append)
    assert late["green"] == {"status": "skipped: no time left"}
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: None)  # a machine without git
    again = gpu_check.check([chosen[0], chosen[-1]], tmp_path, 1.0, said.append, done)
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(again) == ["red", "green"] and again["green"]["status"] == "ok"
    assert record["parts"] == {**done, **again} and record["commit"] == ""


def test_parts_are_chosen_by_a_regular_expression(gpu_check: ModuleType) -> None:
    parts = gpu_check.gpu_parts.core()
    chosen = [part.name for part in gpu_check.only(parts, "in cuda|^step TRL")]
    assert chosen == ["device", "build", "test in cuda", "step TRL with Liger"]


def test_only_kernels_with_green_tests_are_timed(gpu_check: ModuleType) -> None:
    def tested(**green: bool) -> dict[str, object]:
        return {"status": "exit code 1", "result": {"green": green}}

    done = {
        "test in triton": tested(linear_dpo=True, packed_attention=True, kv_shift_rope=True),
        "test in cuda": tested(linear_dpo=True, packed_attention=False),
    }
    words = [f"x{{backends:{op}}}" for op in ("linear_dpo", "packed_attention", "kv_shift_rope")]
    assert [gpu_check.filled(word, {}, done) for word in words] == [
        "x,triton,cuda",
        "x,triton",
        "x,triton",
    ]
    assert gpu_check.filled("{base}", {}, done) == "triton"
    broken = {"test in triton": {"status": "stopped after 9 s"}, "test in cuda": tested()}
    assert gpu_check.filled(words[0], {}, broken) == "x"
    assert gpu_check.filled("{base}", {}, broken) == "reference"


TESTS_OF_ALL_KINDS = """
import os, time, pytest
def test_good(): pass
def test_hangs(): time.sleep(9999)
def test_breaks_the_device(): raise RuntimeError("CUDA error: an illegal memory access")
def test_crashes(): os.kill(os.getpid(), 11)
def test_wrong(): assert 1 == 2
def test_skipped(): pytest.skip("not here")
def test_behind_them(): pass
"""


def test_a_test_that_hangs_or_crashes_costs_no_other(tmp_path: Path) -> None:
    file, out = tmp_path / "test_packed_attention_x.py", tmp_path / "out.json"
    file.write_text(TESTS_OF_ALL_KINDS)
    command = [sys.executable, ROOT / "benchmarks" / "gpu_tests.py", file.name, "--out", out]
    command += ["--mark", "not gpu", "--processes", "1", "--limit", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stderr
    told = json.loads(out.read_text())
    assert told["green"] == {"packed_attention": False}
    bad = {test.rpartition("::")[2]: result for test, result in told["not_good"].items()}
    assert {test: result["outcome"] for test, result in bad.items()} == {
        "test_hangs": "died, exit code 1",
        "test_breaks_the_device": "failed",
        "test_crashes": "died, exit code -11",
        "test_wrong": "failed",
    }
    assert told["counts"]["passed"] == 2 and told["counts"]["skipped"] == 1
    assert "in test_hangs" in bad["test_hangs"]["text"]  # where it hung
    assert "in test_crashes" in bad["test_crashes"]["text"]
