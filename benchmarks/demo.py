"""The demo over several seeds: `python benchmarks/demo.py`. Runs what is not there yet, writes results/demo_cpu.json and the README's picture."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from run import ROOT, circumstances

KEPT = ("seed", "num_eval", "sft", "dpo", "seconds", "seconds_total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo_seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    reports = []
    for seed in arguments.seeds:
        out = arguments.runs / str(seed)
        if not (out / "report.json").exists():
            command = [
                sys.executable,
                "-m",
                "nova_sys.cli",
                "demo",
                "--out",
                out,
                "--seed",
                str(seed),
            ]
            subprocess.run(command, cwd=ROOT, check=True)
        report = json.loads((out / "report.json").read_text())
        reports.append({key: report[key] for key in KEPT})
    record = {
        **circumstances(),
        "command": "python benchmarks/demo.py",
        "num_eval": reports[0]["num_eval"],
        "seeds": reports,
    }
    (ROOT / "benchmarks" / "results" / "demo_cpu.json").write_text(
        json.dumps(record, indent=2) + "\n"
    )
    shutil.copy(
        arguments.runs / str(arguments.seeds[0]) / "report.png",
        ROOT / "docs" / "images" / "demo.png",
    )


if __name__ == "__main__":
    main()
