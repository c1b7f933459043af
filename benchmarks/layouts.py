"""One truth on real data: `python benchmarks/layouts.py --data PAIRS` trains dpo_hh_small on one rank and on TP2 x PP2 with sequence
parallelism, and writes how far losses and gradient norms differ to results/layouts_cpu.json.

The runs lie in --runs and are not repeated when they are finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from run import ROOT, circumstances

RECIPE = "launch/recipes/dpo_hh_small.toml"
FOUR = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
LAYOUTS = {
    "one": [],
    "four": ["--nproc", "4", *(part for setting in FOUR for part in ("--set", setting))],
}


def train(run_dir: Path, data: str, layout: list[str]) -> list[dict[str, Any]]:
    settings = [
        "--set",
        f"data.train={json.dumps(data)}",
        "--set",
        f"run.dir={json.dumps(str(run_dir))}",
    ]
    command = [sys.executable, "-m", "nova_sys.cli", "train", RECIPE, *layout, *settings]
    subprocess.run(command, cwd=ROOT, check=True)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: list[dict], four: list[dict], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(one, four, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="hh-rlhf's harmless-base test split")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "layouts")
    arguments = parser.parse_args()
    one, four = (
        train(arguments.runs / name, arguments.data, layout) for name, layout in LAYOUTS.items()
    )
    record = {
        **circumstances(),
        "command": f"python benchmarks/layouts.py --data {Path(arguments.data).name}",
        "recipe": RECIPE,
        "steps": len(one),
        "first_loss": {"one": one[0]["loss"], "four": four[0]["loss"]},
        "last_loss": {"one": one[-1]["loss"], "four": four[-1]["loss"]},
        "largest_relative_difference": {
            key: largest_difference(one, four, key) for key in ("loss", "grad_norm")
        },
    }
    path = ROOT / "benchmarks" / "results" / "layouts_cpu.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
