"""Everything that a GPU can tell, in one command: `make gpu-check`, or `python benchmarks/gpu_check.py --out DIR --minutes 8`.

Builds the extension in the source tree, runs the GPU tests, then the microbenchmarks, then a training step, each part in a process of its own with a
time limit. DIR/gpu_check.json is written again after every part, so an interruption keeps what was found; a part that fails does not stop the others.
Needs no network, and nothing installed but what the package imports. `--simulate` does the same on a CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
LOG_CHARACTERS = 6000
LEAST_SECONDS = 10.0
"""A part is not started with less."""
TEST_PROCESSES = 4
"""On one GPU, whose memory they share: the largest test takes some 15 GB."""
OPS = {"kv_shift_rope": 60.0, "packed_attention": 180.0, "linear_dpo": 120.0}
"""And the seconds that timing one may take."""
FORMS_TEST = "tests/kernels/test_emulator.py"
IN = "tests/kernels"
TESTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "triton": {
        "kv_shift_rope": (
            60,
            f"{IN}/test_kv_shift_rope_triton.py",
            f"{IN}/test_kv_shift_rope_norms.py",
        ),
        "packed_attention": (90, f"{IN}/test_packed_attention.py"),
        "linear_dpo": (120, f"{IN}/test_linear_logprob_gpu.py"),
    },
    "cuda": {
        "kv_shift_rope": (40, f"{IN}/test_kv_shift_rope_cuda.py"),
        "linear_dpo": (60, f"{IN}/test_linear_logprob_gpu.py"),
        "packed_attention": (60, f"{IN}/test_packed_attention_cuda_gpu.py"),
    },
}
"""Seconds, and where the tests are."""


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float
    """It is killed after so many, or when the whole command's time is over."""
    command: list[str | Path]
    """`{out}` in it becomes the path of the JSON file that the part writes, if it writes one."""
    needs: tuple[str, ...] = ()
    """Parts that must have ended well."""
    tool: str = ""
    """A program that must be there."""


def script(name: str, *arguments: str) -> list[str | Path]:
    return [sys.executable, HERE / name, *arguments, "--out", "{out}"]


def tests(*arguments: str) -> list[str | Path]:
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-m", "gpu"]
    options += ["--maxfail=6", "--tb=short"]  # one machine's time should show more than the first
    if find_spec("xdist"):  # nearly all of the time is Triton compiling
        options += ["-n", str(TEST_PROCESSES)]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def with_backends(names: str, command: list[str | Path]) -> list[str | Path]:
    return ["env", f"NOVA_GPU_BACKENDS={names}", *command]


def parts() -> list[Part]:
    """In order of importance."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--tool"]
    return [
        Part("device", 60, script("gpu_device.py")),
        Part("build", 180, [*build, "--build-temp", "build/gpu-check"], ("device",)),
        Part("test instruction forms", 60, tests(FORMS_TEST), ("build",), "nvcc"),
        *(
            Part(f"test {op} in {kind}", seconds, with_backends(kind, tests(*paths)), ("build",))
            for kind, parts in TESTS.items()
            for op, (seconds, *paths) in parts.items()
        ),
        Part("step triton", 120, script("gpu_step.py", "--variant", "triton"), ("build",)),
        *(
            Part(
                f"time {op}",
                seconds,
                script("run.py", "--no-test", "--op", op, "--seconds", "3"),
                ("build",),
            )
            for op, seconds in OPS.items()
        ),
        *(
            Part(
                f"time {op} with cuda",
                seconds,
                script(
                    "run.py", "--no-test", "--op", op, "--seconds", "3", "--backends", "triton,cuda"
                ),
                (f"test {op} in cuda",),
            )
            for op, seconds in OPS.items()
        ),
        Part("step reference", 120, script("gpu_step.py", "--variant", "reference"), ("build",)),
        Part(
            "tune linear_dpo",
            90,
            script("run.py", "--no-test", "--tune", "--op", "linear_dpo"),
            ("build",),
        ),
        *(
            Part(f"step {variant}", 100, script("gpu_step.py", "--variant", variant), ("build",))
            for variant in ("triton, nothing shared", "triton, kv_shift")
        ),
        *(
            Part(
                f"{tool} {op}",
                60,
                [
                    *sanitizer,
                    tool,
                    *script("run.py", "--no-test", "--op", op, "--tiny", "--seconds", "0"),
                ],
                ("build",),
                "compute-sanitizer",
            )
            for tool in ("memcheck", "racecheck")
            for op in OPS
        ),
    ]


def simulated() -> list[Part]:
    """The same chain where there is no GPU: no build, no tests (both have been), tiny shapes."""
    return [
        Part("device", 60, script("gpu_device.py", "--simulate")),
        *(
            Part(
                f"time {op}",
                120,
                script("run.py", "--no-test", "--op", op, "--tiny", "--seconds", "0.1"),
                ("device",),
            )
            for op in OPS
        ),
        Part(
            "tune linear_dpo",
            120,
            script(
                "run.py", "--no-test", "--tune", "--op", "linear_dpo", "--tiny", "--seconds", "0"
            ),
            ("device",),
        ),
        Part(
            "step reference",
            120,
            script("gpu_step.py", "--variant", "reference", "--tiny", "--steps", "2"),
            ("device",),
        ),
    ]


def run(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """status: ok, or what went wrong."""
    out = folder / f".{part.name.replace(' ', '_').replace(',', '')}.json"
    command = [str(word).replace("{out}", str(out)) for word in part.command]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log = folder / ".log"
    began_s = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
            code = None
    status = (
        "ok"
        if code == 0
        else f"stopped after {seconds:.0f} s"
        if code is None
        else f"exit code {code}"
    )
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began_s, 1)}
    result["log"] = log.read_text(errors="replace")[-LOG_CHARACTERS:]
    if out.exists():
        result["result"] = json.loads(out.read_text())
        out.unlink()
    log.unlink()
    return result


def skipped(part: Part, done: dict[str, Any], seconds: float) -> str:
    """Why the part cannot run, or an empty string."""
    failed = [name for name in part.needs if done.get(name, {}).get("status") != "ok"]
    if failed:
        return f"skipped: needs {', '.join(failed)}"
    if part.tool and shutil.which(part.tool) is None:
        return f"skipped: {part.tool} is not there"
    return "skipped: no time left" if seconds < LEAST_SECONDS else ""


def check(
    chosen: list[Part], folder: Path, minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the parts, with `gpu_check.json` in `folder` up to date after each."""
    folder.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + 60 * minutes
    done: dict[str, Any] = {}
    for part in chosen:
        seconds = min(part.seconds, ends_s - time.monotonic())
        why = skipped(part, done, seconds)
        done[part.name] = {"status": why} if why else run(part, seconds, folder)
        record = {"minutes": minutes, "commit": commit(), "parts": done}
        partial = folder / ".gpu_check.json"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(folder / "gpu_check.json")
        say(f"{done[part.name].get('seconds', 0):6.1f} s  {part.name}: {done[part.name]['status']}")
    return done


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", help="parts whose name contains this, and what they need")
    parser.add_argument("--simulate", action="store_true", help="tiny shapes on a CPU")
    arguments = parser.parse_args()
    chosen = simulated() if arguments.simulate else parts()
    if arguments.only:
        wanted = {p.name for p in chosen if arguments.only in p.name} | {"device", "build"}
        chosen = [part for part in chosen if part.name in wanted]
    done = check(chosen, arguments.out.resolve(), arguments.minutes, lambda s: print(s, flush=True))
    print(f"wrote {arguments.out / 'gpu_check.json'}")
    return int(any(result["status"] != "ok" for result in done.values()))


if __name__ == "__main__":
    sys.exit(main())
