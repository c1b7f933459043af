"""The emulator that runs our CUDA kernels on a CPU: each instruction does what it should, and broken rules are errors."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels.emulation import EMULATOR, ROOT, emulated

SEEDS = range(3)  # eager, mixed and late asynchronous work
FORMS = [(64, 0, 0, 0), (64, 0, 0, 1), (64, 0, 1, 0), (64, 0, 1, 1), (64, 1, 0, 0), (256, 1, 1, 0), (128, 0, 0, 0), (128, 0, 1, 1), (160, 0, 0, 1)]  # fmt: skip
CORNERS = [(0, 0), (40, 16), (-8, 64), (90, 150)]


def call(library: ctypes.CDLL, name: str, *arguments: object) -> str:
    """The error's text, or an empty one."""
    message = ctypes.create_string_buffer(400)
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(library, name)(*given, message, len(message))
    return message.value.decode()


def check_product(library: ctypes.CDLL, device: str, form: tuple[int, ...], seed: int) -> None:
    columns, a_mn, b_mn, _ = form
    a = torch.randint(-8, 9, (64, 64)).bfloat16()
    b = torch.randint(-8, 9, (columns, 64)).bfloat16()
    d = torch.full((64, columns), torch.nan, device=device)
    stored = [(a.T if a_mn else a).contiguous(), (b.T if b_mn else b).contiguous()]
    stored = [tensor.to(device) for tensor in stored]
    assert call(library, "emulate_product", *stored, d, *form, seed) == ""
    assert torch.equal(d.cpu(), a.float() @ b.float().T)


def check_copy(library: ctypes.CDLL, device: str, corner: tuple[int, int], seed: int) -> None:
    source = torch.randn(100, 184).bfloat16().to(device)
    copied = torch.full_like(source, torch.nan)
    assert call(library, "emulate_copy", source, copied, 100, 184, *corner, seed) == ""
    row, col = corner
    inside = torch.zeros(100, 184, dtype=torch.bool, device=device)
    inside[max(row, 0) : row + 64, col : col + 64] = True
    assert torch.equal(copied[inside], source[inside]) and copied[~inside].isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_products(form: tuple[int, ...], seed: int) -> None:
    check_product(emulated("self_test"), "cpu", form, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("corner", CORNERS)
def test_copies_clip_at_the_edges(corner: tuple[int, int], seed: int) -> None:
    """A load gives zeros outside the tensor, a store leaves out what is outside."""
    check_copy(emulated("self_test"), "cpu", corner, seed)


@pytest.mark.gpu
def test_a_gpu_does_what_the_emulator_does(tmp_path: Path) -> None:
    """The same kernels, compiled by nvcc: every instruction form, bit for bit."""
    path = tmp_path / "forms.so"
    command = ["nvcc", "-std=c++17", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "-shared"]
    command += ["-Xcompiler", "-fPIC", "-cudart", "static", "-I", str(ROOT / "csrc")]
    subprocess.run([*command, "-o", str(path), str(EMULATOR / "forms.cu")], check=True)
    library = ctypes.CDLL(str(path))
    for form in FORMS:
        check_product(library, "cuda", form, 0)
    for corner in CORNERS:
        check_copy(library, "cuda", corner, 0)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (0, "never initialised"),
        (1, "one arrival too many"),
        (2, "deadlock: 128 threads wait for an mbarrier"),
        (3, "deadlock: 64 threads wait for __syncthreads"),
        (4, "the threads of a warpgroup disagree"),
        (5, "deadlock: 31 threads wait for the other lanes"),
        (6, "a named barrier of 64 threads is used with 96"),
    ],
)
def test_broken_rules_are_errors(which: int, words: str) -> None:
    for seed in SEEDS:
        message = call(emulated("self_test"), "emulate_broken", which, seed)
        # either thread of the last one may come first
        assert (
            words in message
            or words.replace("64", "x").replace("96", "64").replace("x", "96") in message
        )
