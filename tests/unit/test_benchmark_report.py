"""The numbers and pictures of the documents are the ones in benchmarks/results, and results of a GPU would be shown."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_documents_show_the_results() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


DEVICE = {
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "gpu": {
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "580.1",
        "cuda": "13.0",
        "power.limit": "700 W",
        "after_ceilings": {"clocks.sm": "1755 MHz"},
        "ceilings": {"copy_gb_per_s": 3000.0, "bf16_tflops": 800.0, "fp8_tflops": 1400.0},
    },
}


def timed(op: str, times: dict[str, float], tflop: float) -> dict[str, Any]:
    def row(provider: str, ms: float) -> dict[str, Any]:
        both = {"ms": ms, "gb_per_s": 1e3 / ms, "tflops": 1e3 * tflop / ms}
        return {"case": "a case", "provider": provider, "forward_backward": both, "peak_mib": 1.0}

    return {
        "op": op,
        "hardware": "h100",
        "gpu": DEVICE["gpu"]["name"],
        "versions": {"torch": "2.11.0"},
        "command": "python benchmarks/run.py",
        "ceilings": DEVICE["gpu"]["ceilings"],
        "results": [row(provider, ms) for provider, ms in times.items()],
    }


def step(name: str, pairs_per_s: float | None) -> dict[str, Any]:
    if pairs_per_s is None:
        return {"name": name, "error": "OutOfMemoryError: CUDA out of memory"}
    more = {"tokens_per_s": 200 * pairs_per_s, "tflops": 3 * pairs_per_s, "peak_gib": 60.0}
    more |= {"mfu": 0.4, "mfu_of_measured_gemm": 0.5, "pairs_per_s_of_the_first": pairs_per_s / 150}
    more |= {"kernel_seconds_of_a_step": {"linear layers": 0.3, "attention": 0.1}}
    return {"name": name, "pairs_per_s": pairs_per_s, **more}


def steps(*rows: dict[str, Any]) -> dict[str, Any]:
    settings = {"model.num_layers": 9, "data.pack_length": 8192, "train.global_batch_packs": 2}
    return {"settings": settings, "parameters": 3_000_000_000, "results": list(rows)}


@pytest.fixture
def results(module: Any, tmp_path: Path) -> Path:
    """What a GPU's results would be: made-up numbers."""

    def good(result: dict[str, Any]) -> dict[str, Any]:
        return {"status": "ok", "seconds": 12.3, "log": "long", "result": result}

    attention = {"triton": 4.0, "cuda": 3.0, "FlexAttention": 6.0, "reference": 50.0}
    dpo = {"triton, store": 50.0, "Liger's DPO loss": 200.0, "three products alone": 40.0}
    parts = {
        "device": good(DEVICE),
        "test in cuda": {
            **good({"counts": {"passed": 98, "failed": 2}, "not_good": {}}),
            "status": "exit code 1",
        },
        "time packed_attention": good(timed("packed_attention", attention, 2.0)),
        "time linear_dpo": good(timed("linear_dpo", dpo, 20.0)),
        "time kv_shift_rope": good(timed("kv_shift_rope", {"triton": 0.4, "torch": 2.0}, 0.0)),
        "time kv_shift_rope, all cases": {"status": "skipped: no time left"},
        "step bf16": good(
            steps(step("all in triton", 150.0), step("a in cuda", 140.0), step("b", None))
        ),
        "step fp8 tensorwise": good(steps(step("all in triton", 190.0))),
        "FP8 accuracy gate": {
            **good(
                {
                    "baseline": {"name": "bf16", "losses": {"0": [], "1": []}},
                    "steps": 200,
                    "window": 10,
                    "half_width": 0.01,
                    "candidates": {
                        "delayed": {
                            "largest_difference": 0.02,
                            "windows_outside": [3],
                            "passed": False,
                        }
                    },
                }
            ),
            "status": "exit code 1",
        },
        "step TRL with Liger": good(
            {
                "versions": {"trl": "1.16.0", "liger-kernel": "0.8.5"},
                "liger": True,
                "best": {"pairs_per_step": 16, "pairs_per_s": 30.0, "positions_per_pair": 512.0},
                "ours_times_trl": 5.0,
            }
        ),
    }
    record = {"commit": "abc", "minutes": 8.0, "parts": parts}
    (tmp_path / "gpu_check.json").write_text(json.dumps(record))
    folder = tmp_path / "results"
    folder.mkdir()
    gpu_results: ModuleType = module("gpu_results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(tmp_path), "--results", str(folder)])
        assert gpu_results.main() == 0
    return folder


def test_results_of_a_gpu_are_shown(module: Any, results: Path) -> None:
    ops = ("packed_attention", "linear_dpo", "kv_shift_rope")
    names = {*(f"{op}_h100" for op in ops), "gpu_step_h100", "gpu_check_h100", "fp8_gate_h100"}
    assert {path.stem for path in results.iterdir()} == names
    report, kernels = module("report_gpu"), module("report_kernels")
    shown = report.gpu_step(json.loads((results / "gpu_step_h100.json").read_text()))
    assert "| bf16, all in triton | 150.0 | 30,000 | 450 | 40.0% | 50.0% | 60.0 |" in shown
    assert "| fp8 tensorwise, all in triton | 190.0 |" in shown
    assert "| a in cuda | 140.0 | 0.93 |" in shown and "| b | OutOfMemoryError |  |" in shown
    assert "TRL 1.16.0 with Liger 0.8.5, 16 pairs a step" in shown and "**5.0 times**" in shown
    told = report.gpu_check(json.loads((results / "gpu_check_h100.json").read_text()))
    assert "| test in cuda | exit code 1 (98 passed; 2 failed) | 12.3 |" in told
    assert "copy 3,000 GB/s" in told and "1400 TFLOP/s in FP8" in told and "long" not in told
    gate = report.fp8_gate(json.loads((results / "fp8_gate_h100.json").read_text()))
    assert "| delayed | 0.0200 | 1 | no |" in gate
    table = kernels.kernel_table(json.loads((results / "packed_attention_h100.json").read_text()))
    assert "| cuda | 3.00 | 667 |" in table
    table = kernels.kernel_table(json.loads((results / "kv_shift_rope_h100.json").read_text()))
    assert "GB/s" in table and "| triton | 0.40 | 2500 |" in table


def test_a_machine_without_a_gpu_gives_no_results(module: Any, tmp_path: Path) -> None:
    parts = {"device": {"status": "ok", "result": {"ceilings": {}}}}
    (tmp_path / "gpu_check.json").write_text(json.dumps({"commit": "", "parts": parts}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(tmp_path), "--results", str(tmp_path)])
        assert module("gpu_results").main() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.json"]


def test_pictures_follow_the_results(module: Any, results: Path, tmp_path: Path) -> None:
    plots, images = module("plots"), tmp_path / "images"
    images.mkdir()
    wanted = ["peers_h100.png", "roofline_h100.png", "step_h100.png"]
    assert sorted(plots.stale(results, images)) == wanted
    plots.draw_all(results, images)
    assert sorted(path.name for path in images.iterdir()) == wanted
    assert all(path.stat().st_size < 100_000 for path in images.iterdir())
    assert plots.stale(results, images) == []
    changed = results / "linear_dpo_h100.json"
    changed.write_text(changed.read_text().replace("200.0", "201.0"))
    assert sorted(plots.stale(results, images)) == ["peers_h100.png", "roofline_h100.png"]


def test_a_small_product_is_no_ceiling(module: Any, results: Path) -> None:
    plots = module("plots")
    for path in results.glob("*_h100.json"):
        record = json.loads(path.read_text())
        if "op" in record:
            tiny = {f"tiny_{name}": rate for name, rate in record["ceilings"].items()}
            path.write_text(json.dumps({**record, "ceilings": tiny}))
    assert "roofline_h100.png" not in plots.all_plots(results)
    assert "peers_h100.png" in plots.all_plots(results)
