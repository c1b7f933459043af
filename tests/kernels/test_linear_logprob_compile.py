"""What Triton makes of linear_logprob's kernels for sm_90: no spills, wgmma, TMA; needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SCRIPT = Path(__file__).with_name("compile_linear_logprob.py")
SHARED_BYTES = 227 << 10  # what one program can have on an H100


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """One record per kernel; in another process, because this one may have the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("extent", [(), pytest.param(("--all",), marks=pytest.mark.slow)])
def test_kernels_on_hopper(extent: tuple[str, ...], tmp_path: Path) -> None:
    records = compiled(tmp_path, *extent)
    assert {"fold_kernel", "dlogits_kernel", "sum_rows_kernel"} <= {r["kernel"] for r in records}
    for record in records:
        what, operations = f"{record['name']}, {record['tile']}", record["operations"]
        assert record["stack_bytes"] == 0, what
        assert not {"LDL", "STL", "HMMA"} & set(operations), what
        assert record["shared_bytes"] <= SHARED_BYTES, what
        assert record["warnings"] == [], what  # C7510 and C7512: wgmma serialised
        if record["kernel"] in ("fold_kernel", "dlogits_kernel"):
            products, waits = operations["HGMMA"], operations["WARPGROUP.DEPBAR"]
            assert products >= 4 and waits <= products // 2, what  # one group stays in flight
            assert operations["UTMALDG"] >= 1, what  # the weight comes by TMA,
            assert operations["LDGSTS"] >= 4, what  # the gathered rows by asynchronous copies
        if record["kernel"] == "dlogits_kernel" or "store," in record["name"]:
            assert operations["UTMASTG"] == 2, what  # the two halves of a tile leave by TMA
