"""What this machine is and what it does at most, a part of gpu_check.py. Fails where there is no Hopper GPU.

Ceilings, measured with random data: a copy within the GPU's memory, and products of 8192 x 8192 matrices in bf16 and, by `torch._scaled_mm`, in FP8.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from timing import ceilings, time_in_turns

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "numpy", "transformers"),
    *("trl", "liger-kernel", "accelerate", "apex"),
)
FIELDS = (
    "name,uuid,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,persistence_mode,ecc.mode.current"
)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str]:
    """What it says; nothing where it is not there or does not know a field, which is no reason to measure nothing."""
    query = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia_smi": str(error)[:300]}
    return dict(zip(FIELDS.split(","), done.stdout.splitlines()[0].split(", "), strict=False))


def nvcc() -> str | None:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def fp8_tflops(device: torch.device, size: int) -> float:
    """A square product of e4m3 matrices with one scale each, bf16 out."""
    a, b = torch.randn(2, size, size, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:  # the second operand stands column by column
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    times = time_in_turns({"product": product}, device, 1.0)["product"]
    return 2 * size**3 / statistics.median(times) / 1e9


def gpu() -> dict[str, Any]:
    idle = nvidia_smi()
    properties = torch.cuda.get_device_properties(0)
    measured = measured_ceilings(torch.device("cuda"), tiny=False)
    warm = nvidia_smi()
    return {
        "name": torch.cuda.get_device_name(0),
        **idle,
        "after_ceilings": {k: warm.get(k) for k in ("clocks.sm", "clocks.mem", "power.draw")},
        "compute_capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "ceilings": measured,
    }


def measured_ceilings(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    found: dict[str, Any] = dict(ceilings(device, tiny=tiny))
    try:
        found["fp8_tflops"] = fp8_tflops(device, 256 if tiny else 8192)
    except (RuntimeError, NotImplementedError) as error:
        found["fp8_error"] = str(error)[:300]
    return found


def in_words(record: dict[str, Any]) -> str:
    gpu = record.get("gpu", {})
    names = {
        key: gpu.get(key)
        for key in ("name", "driver_version", "cuda", "clocks.max.sm", "power.limit")
    }
    ceilings = gpu.get("ceilings") or record["ceilings"]
    known = {**names, **record["packages"], **ceilings}
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items() if v
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--simulate", action="store_true")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": {package: installed(package) for package in PACKAGES},
        "nvcc": nvcc(),
        "compute_sanitizer": shutil.which("compute-sanitizer"),
    }
    if arguments.simulate:
        record["ceilings"] = measured_ceilings(torch.device("cpu"), tiny=True)
    else:
        record["gpu"] = gpu()
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(in_words(record))
    if arguments.simulate or torch.cuda.get_device_capability(0) == (9, 0):
        return 0
    print("needs a Hopper GPU (compute capability 9.0)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
