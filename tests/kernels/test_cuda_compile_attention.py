"""What nvcc makes of packed_attention's CUDA kernels for sm_90a; needs no GPU."""

from __future__ import annotations

import re

import pytest

from nova_kernels.testing_cuda import ROOT, CudaKernel, compile_cuda, has_nvcc

LAUNCH = ROOT / "csrc/cuda/packed_attention/launch.cu"
WAIT, ONE_LEFT = "WARPGROUP.DEPBAR", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def roles(kernel: CudaKernel) -> list[tuple[int, int]]:
    """(register budget, registers used) of each role, up to the role's last EXIT: what stands behind
    it are the spin loops and slow paths of all roles."""
    starts = [i for i, x in enumerate(kernel.instructions) if x.startswith("USETMAXREG")]
    found = []
    for first, last in zip(starts, [*starts[1:], len(kernel.instructions)], strict=True):
        part = kernel.instructions[first:last]
        end = max((i for i, x in enumerate(part) if x.startswith("EXIT")), default=len(part))
        used = [int(r) for x in part[:end] for r in re.findall(r"\bR(\d+)", x)]
        found.append((int(part[0].split()[-1], 16), 1 + max(used)))
    return found


def check_loop(kernel: CudaKernel, what: str) -> None:
    """The order of the loop: products, a wait that leaves some running, exponentials, a wait for those."""
    order = kernel.order("HGMMA", ONE_LEFT, WAIT, "MUFU.EX2")
    waits = sum(count for word, count in order if word in (WAIT, ONE_LEFT))
    products = sum(count for word, count in order if word == "HGMMA")
    assert waits <= products // 2, f"{what}: {waits} waits for {products} products"
    # runs of products have several of them: none is waited for alone
    assert all(count >= 4 for word, count in order if word == "HGMMA"), f"{what}: {order}"
    words = [word for word, _ in order]
    last = max(i for i, (word, count) in enumerate(order) if word == "MUFU.EX2" and count >= 32)
    behind = ["HGMMA", ONE_LEFT] if "dkv" in what else [WAIT]  # dV is issued while dP^T still runs
    assert words[last - 2 : last] == ["HGMMA", ONE_LEFT], f"{what}: {order}"
    assert words[last + 1 : last + 1 + len(behind)] == behind, f"{what}: {order}"


@pytest.mark.skipif(not has_nvcc(), reason="no CUDA compiler")
@pytest.mark.parametrize("flags", [(), pytest.param(("-DNOVA_HANG_FLAG",), marks=pytest.mark.slow)])
def test_packed_attention(flags: tuple[str, ...]) -> None:
    kernels = compile_cuda(LAUNCH, *flags)
    for head_dim, (fwd, dq, dkv) in {64: (24, 16, 16), 128: (32, 24, 24)}.items():
        expected = {"fwd": fwd, "bwd_dq": dq, "bwd_dkv": dkv, "delta": 0}
        for part, products in expected.items():
            [kernel] = [
                k for n, k in kernels.items() if re.search(rf"attention_{part}ILi{head_dim}E", n)
            ]
            what, operations = f"{part}, head dim {head_dim}", kernel.operations
            assert kernel.spill_bytes == 0 and not {"LDL", "STL"} & set(operations), what
            assert not {"C7510", "C7512"} & set(kernel.notes), what  # wgmma serialised
            assert not {"ATOM", "ATOMG", "RED", "MEMBAR"} & set(operations), what
            assert "HMMA" not in operations and operations.get("HGMMA", 0) == products, what
            if part == "delta":
                assert any(x.startswith("LDG.E.128") for x in kernel.instructions), what
                continue
            assert operations["UTMALDG"] >= 3 and operations["STSM"] == head_dim // (
                8 if "dkv" in part else 16
            )
            assert any(x.startswith("STG.E.128") for x in kernel.instructions), what
            budgets = [(160, 32)] if (part, head_dim) == ("fwd", 64) else [(240, 24)]
            seen = roles(kernel)
            assert [tuple(b for b, _ in seen)] == budgets, what
            assert all(used <= budget for budget, used in seen), f"{what}: {seen}"
            check_loop(kernel, what)
