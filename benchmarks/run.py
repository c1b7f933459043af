"""Measures ops: `python benchmarks/run.py [--op linear_dpo]`. Prints a table, writes results/<op>_<hardware>.json.

An op whose test is red is not measured. Providers take turns within one run, so a busy moment of the machine hits all. The ops of
nova_kernels run on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from registry import KERNELS, OPS, Kernel, Op
from rich.console import Console
from rich.table import Table
from timing import Case, ceilings
from timing import measure as measure_case

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "liger-kernel")


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


CPU = torch.device("cpu")


def circumstances(device: torch.device = CPU) -> dict[str, Any]:
    sources = ["csrc", "kernels", "benchmarks"]
    known: dict[str, Any] = {
        "hardware": "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", *sources)),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
        words = known["gpu"].lower().replace("-", " ").split()
        known["hardware"] = next((word for word in words if word in ("h100", "h200")), "gpu")
    return known


def test_passes(arguments: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "not slow"]
    return subprocess.run([*command, *arguments.split()], cwd=ROOT).returncode == 0


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


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "seconds"))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(cell_text(row.get(name, "")) for name in columns))
    return table


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `timing.measure` as one line of a table."""
    line = {"case": row["case"], "provider": row["provider"]}
    for phase in ("forward", "forward_backward"):
        if phase in row:
            line |= {f"{phase} ms": row[phase]["ms"], "TFLOP/s": row[phase]["tflops"]}
    peak = row.get("peak_mib")
    return line | {"peak MiB": "" if peak is None else peak, "error": row.get("error", "")}


def cases_of(op: Kernel, device: torch.device, arguments: argparse.Namespace) -> Iterator[Case]:
    if not arguments.tune:
        backends = arguments.backends.split(",")
        return islice(op.cases(device, arguments.tiny, backends), arguments.first)
    if op.tuning is None:
        raise SystemExit("--tune: this op has no candidates; linear_dpo has")
    return islice(op.tuning(device, arguments.tiny), arguments.first)


def run_op(name: str, arguments: argparse.Namespace) -> int:
    op: Op | Kernel = OPS[name] if name in OPS else KERNELS[name]
    if not arguments.no_test and not test_passes(op.test):
        print(f"{name}: {op.test} fails, so there is nothing to measure", file=sys.stderr)
        return 1
    device = torch.device("cuda" if name in KERNELS and torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"op": name, **circumstances(device)}
    path = arguments.out or ROOT / "benchmarks" / "results" / f"{name}_{record['hardware']}.json"
    path.parent.mkdir(exist_ok=True)
    if isinstance(op, Op):
        record["unit"] = f"{op.unit}/s"
        record["results"] = measure(op, arguments.repeats)
        Console().print(table_of(f"{name}, {op.unit}/s", record["results"]))
    else:
        record["ceilings"] = ceilings(device, tiny=arguments.tiny)
        record["results"] = []
        for case in cases_of(op, device, arguments):
            record["results"] += measure_case(case, device, arguments.seconds)
            path.write_text(json.dumps(record, indent=1) + "\n")  # what was measured counts
        Console().print(table_of(name, [flat(row) for row in record["results"]]))
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = sorted([*OPS, *KERNELS])
    parser.add_argument("--op", choices=names, help="one op; without it, every op")
    parser.add_argument("--repeats", type=int, default=7, help="calls of host code, per case")
    parser.add_argument("--seconds", type=float, default=8.0, help="timing a kernel, per case")
    parser.add_argument("--tiny", action="store_true", help="kernels: to test the code")
    parser.add_argument(
        "--backends", default="reference,triton", help="of the kernels; cuda only when asked for"
    )
    parser.add_argument(
        "--tune", action="store_true", help="candidates for a kernel's tile sizes; writes --out"
    )
    parser.add_argument("--first", type=int, metavar="N", help="of a kernel's cases, not all")
    parser.add_argument("--no-test", action="store_true", help="its tests have been green here")
    parser.add_argument("--out", type=Path, help="the JSON file, with --op")
    arguments = parser.parse_args()
    if arguments.out and not arguments.op:
        parser.error("--out is the file of one op: say --op as well")
    if arguments.tune and not arguments.out:
        parser.error("--tune does not replace an op's results: say --op and --out as well")
    return max(run_op(name, arguments) for name in ([arguments.op] if arguments.op else names))


if __name__ == "__main__":
    sys.exit(main())
