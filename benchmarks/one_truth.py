"""How far every way to compute a step is from one rank: `make truth` runs tests/distributed/test_layouts.py, and writes what it
measured to results/one_truth_cpu.json when it is green."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from run import ROOT, circumstances, git

TEST = "tests/distributed/test_layouts.py"
SOURCES = ["nova_sys", "kernels", "csrc", "tests/distributed"]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="nova_truth_") as folder:
        measured = Path(folder) / "measured.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--no-header", TEST],
            cwd=ROOT,
            env={**os.environ, "NOVA_RECORD": str(measured)},
        )
        if done.returncode:
            print(f"{TEST} fails, so there is nothing to record", file=sys.stderr)
            return done.returncode
        rows = json.loads(measured.read_text())
    record = circumstances()
    record["versions"] |= {name: version(name) for name in ("torch", "megatron-core")}
    record["uncommitted"] = bool(git("status", "--porcelain", "--", *SOURCES))
    record |= {"command": "make truth", "test": TEST, "results": rows}
    path = ROOT / "benchmarks" / "results" / "one_truth_cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
