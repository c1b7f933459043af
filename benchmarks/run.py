"""Measures ops: `python benchmarks/run.py [--op packing]`. Prints a table, writes results/<op>_<hardware>.json.

An op whose test is red is not measured. Providers take turns within one run, so a busy moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from registry import OPS, Op
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def circumstances() -> dict[str, Any]:
    sources = ["csrc", "kernels", "benchmarks/registry.py", "benchmarks/run.py"]
    return {
        "hardware": "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", *sources)),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }


def test_passes(op: Op) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", op.test]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def measure(op: Op, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for case, make_input in op.cases.items():
        given = make_input()
        outputs = {name: call(given) for name, call in op.providers.items()}  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in op.providers}
        for _ in range(repeats):
            for name, call in op.providers.items():
                start_s = time.perf_counter()
                call(given)
                seconds[name].append(time.perf_counter() - start_s)
        for name, output in outputs.items():
            row: dict[str, Any] = {"case": case, "provider": name}
            row["median"] = round(op.amount(given) / statistics.median(seconds[name]))
            row["best"] = round(op.amount(given) / min(seconds[name]))
            rows.append(row | op.quality(given, output) | {"seconds": seconds[name]})
    return rows


def cell_text(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:,}" if value > 1000 else f"{value:.2f}"


def table_of(op_name: str, op: Op, rows: list[dict[str, Any]]) -> Table:
    columns = [name for name in rows[0] if name != "seconds"]
    table = Table(*columns, title=f"{op_name}, {op.unit}/s")
    for row in rows:
        table.add_row(*(cell_text(row[name]) for name in columns))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=sorted(OPS), help="one op; without it, every op")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls per provider and case")
    arguments = parser.parse_args()
    for name in [arguments.op] if arguments.op else sorted(OPS):
        if not test_passes(OPS[name]):
            print(
                f"{name}: {OPS[name].test} fails, so there is nothing to measure", file=sys.stderr
            )
            return 1
        record = {"op": name, "unit": f"{OPS[name].unit}/s", **circumstances()}
        record["results"] = measure(OPS[name], arguments.repeats)
        path = ROOT / "benchmarks" / "results" / f"{name}_{record['hardware']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        Console().print(table_of(name, OPS[name], record["results"]))
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
