"""What Triton makes of our kernels for sm_90: no spills, wgmma, TMA, wide loads; needs no GPU."""

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
SHARED_BYTES = 227 << 10  # what one program can have on an H100
OLDER = Path(__file__).resolve().parents[2] / ".venv" / "triton-3.6.0"
"""The H100 stack's Triton, where `make setup` put it beside a newer one."""

MAY_SPILL = {
    ("dq", 192): 424,
    ("dkv", 192): 864,
    ("dkv", 96): 64,
    ("dkv", 128): 88,
    ("dkv", 256): 88,
}
"""Bytes per thread. 96, 128 and 256 spill only for groups that are no power of two; 192 pads every row to 256."""
EXTENT = pytest.mark.parametrize("extent", [(), pytest.param(("--all",), marks=pytest.mark.slow)])


@pytest.fixture(params=["pinned", "3.6.0"])
def triton_path(request: pytest.FixtureRequest) -> str:
    """What to put in front of the import path."""
    if request.param == "pinned":
        return ""
    if not OLDER.exists():
        pytest.skip("one Triton only: `make setup` puts 3.6.0 beside a newer one")
    return str(OLDER)


def compiled(op: str, folder: Path, triton_path: str, *arguments: str) -> list[dict[str, Any]]:
    """One record per kernel; in another process, because this one may have the interpreter."""
    script = Path(__file__).with_name(f"compile_{op}.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": triton_path},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(record: dict[str, Any], *, may_spill: int = 0) -> None:
    assert record["stack_bytes"] <= may_spill, record["name"]
    if not may_spill:
        assert not {"LDL", "STL"} & set(record["operations"]), record["name"]
    assert "HMMA" not in record["operations"], record["name"]  # the matrix unit of older GPUs
    assert record["shared_bytes"] <= SHARED_BYTES, record["name"]
    if may_spill < 500:
        assert record["warnings"] == [], record["name"]  # C7510 and C7512: wgmma serialised


@EXTENT
def test_linear_logprob(extent: tuple[str, ...], triton_path: str, tmp_path: Path) -> None:
    records = compiled("linear_logprob", tmp_path, triton_path, *extent)
    assert {"fold_kernel", "dlogits_kernel", "sum_rows_kernel"} <= {r["kernel"] for r in records}
    for record in records:
        check(record)
        what, operations = f"{record['name']}, {record['tile']}", record["operations"]
        if record["kernel"] in ("fold_kernel", "dlogits_kernel"):
            products, waits = operations["HGMMA"], operations["WARPGROUP.DEPBAR"]
            assert products >= 4 and waits <= products // 2, what  # one group stays in flight
            assert operations["UTMALDG"] >= 1, what  # the weight comes by TMA,
            assert operations["LDGSTS"] >= 4, what  # the gathered rows by asynchronous copies
        if record["kernel"] == "dlogits_kernel" or "store," in record["name"]:
            assert operations["UTMASTG"] == 2, what  # the two halves of a tile leave by TMA


@EXTENT
def test_packed_attention(extent: tuple[str, ...], triton_path: str, tmp_path: Path) -> None:
    records = compiled("packed_attention", tmp_path, triton_path, *extent)
    assert {"fwd", "dq", "dkv"} == {r["kernel"] for r in records}
    for record in records:
        check(record, may_spill=MAY_SPILL.get((record["kernel"], record["head_dim"]), 0))
        what, operations = f"{record['name']}, {record['tile']}", record["operations"]
        assert operations["HGMMA"] >= 8 and operations["UTMALDG"] >= 3, what


@EXTENT
def test_kv_shift_rope(extent: tuple[str, ...], tmp_path: Path) -> None:
    records = compiled("kv_shift_rope", tmp_path, "", *extent)
    assert {"fwd_kernel", "bwd_kernel"} == {r["kernel"] for r in records}
    assert any("norms=True" in r["name"] for r in records)
    for record in records:
        # Half of the dims turned, interleaved, mixed and normalised at once: no model does that.
        everything = record["interleaved"] and "mixes=True, norms=True" in record["name"]
        check(record, may_spill=120 if everything else 0)
        if record["name"].startswith("32/8 heads of 128, 128 dims"):
            # 8 heads of Q with two halves each in one branch of the program, 8 of K, 8 of V: in bf16
            # a thread's 8 elements are one 16-byte access. Norms add a program's sums: 2 of Q, 2 of K.
            assert record["operations"]["STG"] <= 84, record["name"]
