"""Everything that a GPU can tell, in one command: `make gpu-check`, or `nova bench --all --out DIR --minutes 8`.

What the machine is and can do, the extension built, GPU tests, Transformer Engine, microbenchmarks beside their peers, training steps (gpu_parts.py),
each in a process of its own with a time limit. DIR/gpu_check.json is written again after every part, so an interruption keeps what was found; a
part that fails does not stop the others. Needs no network, and nothing installed but what the package imports. `--simulate`: on a CPU, tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gpu_parts
from gpu_parts import Part

ROOT = Path(__file__).resolve().parents[1]
LOG_CHARACTERS = 6000
LEAST_SECONDS = 10.0
"""A part is not started with less."""
KINDS = ("triton", "cuda")
DEFAULTS = {
    # one rank: without a network the name of this machine may be looked up for many seconds
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}
"""Of the environment of all parts, unless something else is set."""


def green_backends(op: str, done: dict[str, Any]) -> list[str]:
    """Those kernels of an op whose tests have been green in this call, or were not asked for (`--only`)."""
    tests = {kind: done.get(f"test in {kind}") for kind in KINDS}
    return [
        kind
        for kind, part in tests.items()
        if part is None or part.get("result", {}).get("green", {}).get(op)
    ]


def filled(word: str, values: dict[str, Path], done: dict[str, Any]) -> str:
    """A word of a part's command with its `{...}` replaced."""

    def value(found: re.Match[str]) -> str:
        name, _, op = found[1].partition(":")
        if name == "backends":
            return "".join(f",{kind}" for kind in green_backends(op, done))
        if name == "base":
            good = [set(green_backends(op, done)) for op in gpu_parts.OPS]
            return "triton" if all("triton" in kinds for kinds in good) else "reference"
        return str(values[name])

    return re.sub(r"\{(out|folder|work|base|backends:\w+)\}", value, word)


def run(
    part: Part, seconds: float, folders: dict[str, Path], done: dict[str, Any]
) -> dict[str, Any]:
    """status: ok, skipped with the reason, or what went wrong."""
    out = folders["work"] / f"{part.name.replace(' ', '_').replace(',', '')}.json"
    command = [filled(str(word), {**folders, "out": out}, done) for word in part.command]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**DEFAULTS, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log = folders["work"] / "log"
    began_s = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C: the part, and what it started
            end_group(process)
    result: dict[str, Any] = {"status": "ok", "seconds": round(time.monotonic() - began_s, 1)}
    if out.exists():
        with suppress(json.JSONDecodeError):  # it was ended while it wrote
            result["result"] = json.loads(out.read_text())
    if code is None:
        result["status"] = f"stopped after {seconds:.0f} s"
    elif code != 0:
        result["status"] = f"exit code {code}"
    elif "skipped" in result.get("result", {}):
        result["status"] = f"skipped: {result['result']['skipped']}"
    result["log"] = log.read_text(errors="replace")[-LOG_CHARACTERS:]
    return result


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the process's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver may hold what a kernel has hung
        process.wait(30)


def find_cuda() -> None:
    """Puts CUDA's programs on PATH, for all parts: where it is installed they often are not."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    if folder.is_dir():
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(folder)])


def skipped(part: Part, done: dict[str, Any], seconds: float) -> str:
    """Why the part cannot run, or an empty string."""
    failed = [name for name in part.needs if done.get(name, {}).get("status") != "ok"]
    if failed:
        return f"skipped: needs {', '.join(failed)}"
    if part.tool and shutil.which(part.tool) is None:
        return f"skipped: {part.tool} is not there"
    return "skipped: no time left" if seconds < LEAST_SECONDS else ""


def check(
    chosen: list[Part],
    folder: Path,
    minutes: float,
    say: Callable[[str], None],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the parts, with `gpu_check.json` in `folder` up to date after each. earlier: parts of another call, which are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + 60 * minutes
    done = dict(earlier or {})
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        folders = {"folder": folder, "work": Path(work)}
        for part in chosen:
            seconds = min(part.limit_s, ends_s - time.monotonic())
            done.pop(part.name, None)
            why = skipped(part, done, seconds)
            done[part.name] = {"status": why} if why else run(part, seconds, folders, done)
            save({"minutes": minutes, "commit": commit(), "parts": done}, folder)
            say(told(part, done[part.name]))
    return {part.name: done[part.name] for part in chosen}


def told(part: Part, result: dict[str, Any]) -> str:
    """What is printed: how the part ended, and the last line that it said."""
    first = f"{result.get('seconds', 0.0):6.1f} s of {part.expected_s:3.0f}  {part.name}: {result['status']}"
    said = [line for line in result.get("log", "").splitlines() if line.strip()]
    return "\n".join([first, *(f"             {line[:400]}" for line in said[-1:])])


def save(record: dict[str, Any], folder: Path) -> None:
    partial = folder / ".gpu_check.json"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(folder / "gpu_check.json")


def commit() -> str:
    """Empty where there is no git, or only the files."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def only(parts: list[Part], text: str) -> list[Part]:
    """Those in whose name the regular expression is found, and all that they need."""
    by_name = {part.name: part for part in parts}
    wanted = [part.name for part in parts if re.search(text, part.name)]
    for name in wanted:  # grows while it is read
        wanted += [needed for needed in by_name[name].needs if needed not in wanted]
    return [part for part in parts if part.name in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", help="parts whose name matches this, and what they need")
    parser.add_argument(
        "--after",
        type=Path,
        help="gpu_check.json of an earlier call: its parts are kept, its tests count",
    )
    parser.add_argument("--list", action="store_true", help="the parts and their expected seconds")
    parser.add_argument("--simulate", action="store_true", help="tiny shapes on a CPU")
    arguments = parser.parse_args()
    chosen = gpu_parts.simulated() if arguments.simulate else gpu_parts.core() + gpu_parts.more()
    if arguments.only:
        chosen = only(chosen, arguments.only)
    if arguments.list:
        for part in chosen:
            print(f"{part.expected_s:5.0f} s, at most {part.limit_s:3.0f}  {part.name}")
        return 0
    find_cuda()
    earlier = json.loads(arguments.after.read_text())["parts"] if arguments.after else {}
    folder = arguments.out.resolve()
    done = check(chosen, folder, arguments.minutes, lambda s: print(s, flush=True), earlier)
    print(f"wrote {arguments.out / 'gpu_check.json'}")
    good = ("ok", "skipped")
    return int(any(not result["status"].startswith(good) for result in done.values()))


if __name__ == "__main__":
    sys.exit(main())
