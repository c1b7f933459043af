"""The gate that compares FP8's loss curves with bf16's: what passes, what does not, and the script itself on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gate() -> Any:
    sys.path.insert(0, str(BENCHMARKS))  # as when it runs as a script
    try:
        spec = importlib.util.spec_from_file_location("fp8_gate", BENCHMARKS / "fp8_gate.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["fp8_gate"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def curves(seed: int, shift: float = 0.0, noise: float = 0.05) -> dict[str, list[float]]:
    """Three seeds of 200 steps that fall from 0.69 to 0.3."""
    rng = np.random.default_rng(seed)
    falling = np.linspace(0.69, 0.3, 200)
    return {str(s): (falling + shift + rng.normal(0, noise, 200)).tolist() for s in range(3)}


def test_other_rounding_on_the_same_pairs_stays_in_the_band(gate: Any) -> None:
    baseline = curves(0)
    assert gate.half_width(baseline) == pytest.approx(2 * 0.05 / np.sqrt(10), rel=0.3)
    rng = np.random.default_rng(1)
    for _ in range(20):
        rounded = {seed: np.add(losses, rng.normal(0, 0.02, 200)).tolist() for seed, losses in baseline.items()}  # fmt: skip
        assert gate.judge(baseline, rounded)["passed"]
    assert gate.judge(baseline, baseline) == {
        "largest_difference": 0.0,
        "windows_outside": [],
        "passed": True,
    }


def test_a_curve_outside_of_the_band_fails(gate: Any) -> None:
    baseline = curves(0)
    shifted = gate.judge(baseline, curves(1, shift=0.06))
    assert not shifted["passed"] and len(shifted["windows_outside"]) > 10
    stuck = {seed: [0.6931] * 200 for seed in baseline}
    assert gate.judge(baseline, stuck)["windows_outside"][-17:] == list(range(3, 20))
    late = {seed: [*losses[:190], *[loss + 0.2 for loss in losses[190:]]] for seed, losses in baseline.items()}  # fmt: skip
    assert gate.judge(baseline, late)["windows_outside"] == [19]
    broken = {seed: [*losses[:-1], float("nan")] for seed, losses in baseline.items()}
    assert gate.judge(baseline, broken) == {
        "largest_difference": None,
        "windows_outside": [19],
        "passed": False,
    }


def test_the_band_has_a_least_width(gate: Any) -> None:
    same = {str(seed): [0.6931] * 20 for seed in range(3)}
    assert gate.half_width(same) == gate.NARROWEST


def test_the_script_on_a_cpu(gate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "gate.json", tmp_path / "gate.png"
    small = ["--simulate", "--steps", "10", "--seeds", "0", "1"]
    assert gate.main([*small, "--out", str(out), "--plot", str(picture)]) == 0
    record = json.loads(out.read_text())
    losses = {
        record["baseline"]["name"]: record["baseline"]["losses"],
        **{name: result["losses"] for name, result in record["candidates"].items()},
    }
    assert {name: sorted(by_seed) for name, by_seed in losses.items()} == {"fp32": ["0", "1"], "bf16": ["0", "1"]}  # fmt: skip
    for seed in ("0", "1"):
        assert len(losses["fp32"][seed]) == 10 and losses["fp32"][seed] != losses["bf16"][seed]
        assert losses["fp32"][seed][0] == pytest.approx(0.6931472, abs=1e-5)
        assert np.allclose(losses["fp32"][seed], losses["bf16"][seed], atol=0.02)
    assert losses["fp32"]["0"] != losses["fp32"]["1"]
    assert record["simulated"] and record["candidates"]["bf16"]["passed"]
    assert picture.stat().st_size > 10_000
    assert "| bf16 | " in capsys.readouterr().out


def test_a_recipe_that_leaves_the_band_fails_the_script(gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    found = {"fp32": curves(0), "bf16": curves(1, shift=0.2)}
    monkeypatch.setattr(gate, "curves_of", lambda *_: iter(found.items()))
    out = tmp_path / "gate.json"
    assert gate.main(["--simulate", "--out", str(out)]) == 1
    assert not json.loads(out.read_text())["candidates"]["bf16"]["passed"]


def test_without_a_gpu_it_says_what_is_missing(
    gate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main(["--recipes", "delayed", "--out", str(tmp_path / "gate.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
