"""The demo from data to picture, with runs of a few steps, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from nova_sys import demo

if __name__ == "__main__":
    demo.NUM_SFT, demo.NUM_PAIRS, demo.NUM_EVAL = 300, 90, 30
    steps = ["train.steps=3", "optimizer.warmup_steps=1"]
    sys.exit(demo.run_demo(Path(sys.argv[1]), seed=int(sys.argv[2]), overrides=steps))
"""


def _demo(out: Path, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(out), str(seed)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_demo_from_data_to_report(tmp_path: Path) -> None:
    out = tmp_path / "a demo"  # paths with spaces reach the runs unharmed
    done = _demo(out, seed=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after SFT" in done.stdout and "reverse" in done.stdout

    report = json.loads((out / "report.json").read_text())
    assert report["num_eval"] == 30 and report["seed"] == 1 and len(report["samples"]) == 6
    for stage in ("sft", "dpo"):
        assert set(report[stage]["by_task"]) == {"add", "sort", "reverse"}
        assert all(0 <= share <= 1 for share in report[stage]["by_task"].values())
        assert len((out / stage / "metrics.jsonl").read_text().splitlines()) == 3
        assert list((out / stage / "checkpoints").glob("step_*"))
        assert list((out / stage / "tensorboard").glob("events*"))
    assert 0 <= report["dpo"]["reward_accuracy"] <= 1
    assert (out / "report.png").stat().st_size > 20_000
    first_loss = json.loads((out / "dpo" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert abs(first_loss - 0.693147) < 1e-5  # DPO starts from the SFT checkpoint, its reference

    other = _demo(out, seed=2)  # another demo's folder is not trained on
    assert other.returncode != 0 and "holds another run" in other.stderr
