"""What this machine is: a part of gpu_check.py. Fails where there is no Hopper GPU."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "numpy", "transformers")
FIELDS = "name,uuid,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu() -> dict[str, Any]:
    query = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]
    properties = torch.cuda.get_device_properties(0)
    return {
        **dict(zip(FIELDS.split(","), values.split(", "), strict=True)),
        "compute_capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--simulate", action="store_true")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": {package: installed(package) for package in PACKAGES},
    }
    if not arguments.simulate:
        record["gpu"] = gpu()
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    if arguments.simulate or torch.cuda.get_device_capability(0) >= (9, 0):
        return 0
    print("needs a Hopper GPU (compute capability 9.0)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
