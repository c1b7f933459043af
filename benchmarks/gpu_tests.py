"""The GPU tests of some files, a part of gpu_check.py: `python benchmarks/gpu_tests.py FILE ... --out FILE.json`.

Several processes share the tests, because nearly all of their time is compiling. A test that hangs, or leaves the device unusable, ends its
process (gpu_test_limit.py); the tests behind it go on in a new one. Exit code 0: all have passed or were skipped; what there is no time left for is
not red, and keeps no kernel from being measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OPS = {"kv_shift": "kv_shift_rope", "packed_attention": "packed_attention", "linear": "linear_dpo"}
"""Part of a test file's name -> the op of registry.py that it tests."""
MAX_DEATHS = 6
"""Of one process and its successors: what is behind the last one is not run."""
GOOD = ("passed", "skipped")
LATE = "no time left"


def pytest(*arguments: str) -> list[str]:
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--tb=short"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def collect(files: list[str], mark: str) -> list[str]:
    command = pytest("--collect-only", "-m", mark, *files)
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    tests = [line for line in done.stdout.splitlines() if "::" in line and "<" not in line]
    if done.returncode != 0 or not tests:
        raise SystemExit(f"no tests found:\n{(done.stdout + done.stderr)[-3000:]}")
    return tests


def spread(tests: list[str]) -> list[str]:
    """So that whatever time is left for, it is as large a share of every file."""
    of_file: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        of_file[test.partition("::")[0]].append(test)
    places = [(i / len(same), test) for same in of_file.values() for i, test in enumerate(same)]
    return [test for _, test in sorted(places, key=lambda place: place[0])]


def run_share(
    tests: list[str], notes: Path, limit_s: float, ends_s: float
) -> dict[str, dict[str, Any]]:
    """Outcome, seconds and text by test. A process that dies takes the test with it that it was running, and no other.

    ends_s: of time.monotonic(); then what is left is not run.
    """
    results: dict[str, dict[str, Any]] = {}
    more = {"NOVA_TEST_NOTES": str(notes), "NOVA_TEST_LIMIT_S": str(limit_s)}
    for _ in range(MAX_DEATHS):
        left = [test for test in tests if test not in results]
        if not left:
            break
        notes.write_text("")
        command = pytest("-p", "gpu_test_limit", *left)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment(**more),
                timeout=max(1.0, ends_s - time.monotonic()),
            )
        except subprocess.TimeoutExpired:
            read_notes(notes, results)
            ended = {t: r for t, r in results.items() if r["outcome"] != "started"}
            return {t: {"outcome": LATE, "text": ""} for t in tests} | ended
        read_notes(notes, results)
        for result in results.values():
            if result["outcome"] == "started":
                result |= {"outcome": f"died, exit code {done.returncode}"}
                result["text"] = (done.stderr or done.stdout)[:2000]  # the last call comes first
        if set(left) == {test for test in tests if test not in results}:
            said = (done.stdout + done.stderr)[-3000:]
            return results | {test: {"outcome": "not run", "text": said} for test in left}
    return results | {t: {"outcome": "not run", "text": ""} for t in tests if t not in results}


def read_notes(notes: Path, results: dict[str, dict[str, Any]]) -> None:
    for line in notes.read_text().splitlines():
        noted = json.loads(line)
        known = results.setdefault(noted["test"], {"outcome": "started"})
        if noted["outcome"] == "failed" or (
            known["outcome"] == "started" and noted["outcome"] in GOOD
        ):
            known |= noted


def by_op(results: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether all tests of an op that there was time for were good, and one of them ran."""
    green: dict[str, bool] = {}
    for part, op in OPS.items():
        outcomes = [r["outcome"] for test, r in results.items() if part in test.partition("::")[0]]
        if outcomes:
            green[op] = "passed" in outcomes and all(
                outcome in (*GOOD, LATE) for outcome in outcomes
            )
    return green


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    bad = {test: r for test, r in results.items() if r["outcome"] not in (*GOOD, LATE)}
    slowest = sorted(results, key=lambda test: -results[test].get("seconds", 0.0))[:10]
    return {
        "counts": dict(Counter(result["outcome"] for result in results.values())),
        "green": by_op(results),
        "not_good": {test: {k: r.get(k) for k in ("outcome", "text")} for test, r in bad.items()},
        "slowest": {test: round(results[test].get("seconds", 0.0), 2) for test in slowest},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mark", default="gpu")
    parser.add_argument("--processes", type=int, default=4, help="the largest test takes 15 GB")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one test")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of all of them")
    arguments = parser.parse_args()
    ends_s = time.monotonic() + arguments.seconds
    tests = spread(collect(arguments.files, arguments.mark))
    shares = [tests[i :: arguments.processes] for i in range(arguments.processes)]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(shares)) as pool:
        running = [
            pool.submit(run_share, share, Path(folder) / f"{i}.jsonl", arguments.limit, ends_s)
            for i, share in enumerate(shares)
            if share
        ]
        for future in as_completed(running):
            results |= future.result()
            arguments.out.write_text(json.dumps(summary(results), indent=1) + "\n")
    told = summary(results)
    for test, result in list(told["not_good"].items())[:8]:
        print(f"{result['outcome']}: {test}\n{(result['text'] or '')[-600:]}")
    print(json.dumps({key: told[key] for key in ("counts", "green")}))
    return int(bool(told["not_good"]) or LATE in told["counts"])


if __name__ == "__main__":
    sys.exit(main())
