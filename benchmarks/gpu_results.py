"""What gpu_check.py found, as results that report.py shows: `python benchmarks/gpu_results.py DIR` reads DIR/gpu_check.json.

It writes benchmarks/results/gpu_check_<gpu>.json (the machine, what passed, how long it took), gpu_step_<gpu>.json (all training steps, and TRL's),
fp8_gate_<gpu>.json and <op>_<gpu>.json. Parts that did not end well change no file of theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu_parts import OPS

RESULTS = Path(__file__).resolve().parent / "results"
GATE = "FP8 accuracy gate"
TRL = "step TRL with Liger"


def hardware(device: dict[str, Any]) -> str:
    words = device["gpu"]["name"].lower().replace("-", " ").split()
    return next((word for word in words if word in ("h100", "h200")), "gpu")


def result_of(parts: dict[str, Any], name: str) -> dict[str, Any] | None:
    part = parts.get(name, {})
    return part.get("result") if part.get("status") == "ok" else None


def overview(record: dict[str, Any]) -> dict[str, Any]:
    """Without the logs, and without what stands in files of its own."""
    parts = {}
    for name, part in record["parts"].items():
        parts[name] = {k: part[k] for k in ("status", "seconds") if k in part}
        if name.startswith(("test", "Transformer", "build", "memcheck", "racecheck", "synccheck")):
            parts[name]["result"] = part.get("result")
    about = {k: record[k] for k in ("commit", "minutes")}
    return {**about, "device": record["parts"]["device"]["result"], "parts": parts}


def steps(record: dict[str, Any]) -> dict[str, Any] | None:
    parts = record["parts"]
    ours = {
        name: part["result"]
        for name, part in parts.items()
        if name.startswith("step") and name != TRL and part.get("result", {}).get("results")
    }
    if "step bf16" not in ours:
        return None
    device = parts["device"]["result"]
    found = {"commit": record["commit"], "device": device, "steps": ours}
    return found | (
        {"trl": trl} if (trl := parts.get(TRL, {}).get("result", {})).get("best") else {}
    )


def results(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a file -> its content."""
    gpu = hardware(record["parts"]["device"]["result"])
    found = {f"gpu_check_{gpu}": overview(record)}
    measured = steps(record)
    found |= {f"gpu_step_{gpu}": measured} if measured else {}
    gate = record["parts"].get(GATE, {}).get("result", {})  # also one that did not pass
    found |= {f"fp8_gate_{gpu}": gate} if "candidates" in gate else {}
    for op in OPS:
        timed = result_of(record["parts"], f"time {op}, all cases")
        timed = timed or result_of(record["parts"], f"time {op}")
        found |= {f"{op}_{gpu}": timed} if timed else {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    record = json.loads((arguments.folder / "gpu_check.json").read_text())
    if "gpu" not in record["parts"].get("device", {}).get("result", {}):
        print(f"{arguments.folder}: its part `device` found no GPU, so there is nothing to show", file=sys.stderr)  # fmt: skip
        return 1
    for name, content in results(record).items():
        path = arguments.results / f"{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
