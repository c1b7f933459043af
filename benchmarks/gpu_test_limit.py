"""A pytest plugin for gpu_tests.py: notes every test's start and end in a file, and ends the process where a test hangs or has broken the device.

A kernel that never ends cannot be interrupted from Python, so a thread of faulthandler ends the process; after an error that stays with the
process ("CUDA error: an illegal memory access ..."), every further test would fail, too. gpu_tests.py goes on with the rest in a new process.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOTES = Path(os.environ["NOVA_TEST_NOTES"])
LIMIT_S = float(os.environ["NOVA_TEST_LIMIT_S"])
STDERR = os.fdopen(os.dup(2), "w")
"""As it was before pytest captured it."""
LASTING = ("CUDA error", "Triton Error [CUDA]")


def note(**values: Any) -> None:
    with NOTES.open("a") as out:
        out.write(json.dumps(values) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    note(test=item.nodeid, outcome="started")
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown" and report.passed:
        return note(test=report.nodeid, outcome="ended")
    if report.when == "call" or not report.passed:
        text = report.longreprtext
        outcome = "failed" if report.failed else report.outcome
        note(test=report.nodeid, outcome=outcome, seconds=report.duration, text=text[-1500:])
        if any(error in text for error in LASTING):
            os._exit(1)
