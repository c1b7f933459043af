"""What nvcc makes of our CUDA kernels for sm_90a: registers, spills, and the order of the instructions; needs no GPU."""

from __future__ import annotations

import re

import pytest

from nova_kernels.testing_cuda import ROOT, CudaKernel, compile_cuda, has_nvcc

pytestmark = pytest.mark.skipif(not has_nvcc(), reason="no CUDA compiler")
HANG_FLAG = pytest.param(("-DNOVA_HANG_FLAG",), marks=pytest.mark.slow)
WAIT = "WARPGROUP.DEPBAR"
WAIT_FOR_ALL, WAIT_FOR_OLDER = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
LINEAR_LOGPROB = {  # kernel<flags>: boxes that it stores
    "fold_kernelILb0ELb0E": 0,
    "fold_kernelILb0ELb1E": 4,
    "fold_kernelILb1ELb0E": 0,
    "fold_kernelILb1ELb1E": 4,
    "dlogits_kernelILb0E": 4,
    "dlogits_kernelILb1E": 4,
}


def check_clean(kernel: CudaKernel) -> None:
    assert kernel.spill_bytes == 0 and not {"LDL", "STL"} & set(kernel.operations), kernel.name
    assert not {"C7510", "C7512"} & set(kernel.notes), kernel.name  # wgmma serialised
    assert "HMMA" not in kernel.operations, kernel.name  # the matrix unit of older GPUs
    assert not {"LD", "ST"} & set(kernel.operations), kernel.name  # of no known memory: slower
    assert not {"ATOM", "ATOMG", "RED"} & set(kernel.operations), kernel.name


def check_order(kernel: CudaKernel) -> None:
    """Four products, a wait that leaves them running, no memory barrier before they are complete, and
    the exponentials only then."""
    order = kernel.order("HGMMA", WAIT_FOR_OLDER, WAIT_FOR_ALL, "MUFU.EX2")
    assert order[:3] == [("HGMMA", 4), (WAIT_FOR_OLDER, 1), (WAIT_FOR_ALL, 1)], kernel.name
    assert {word for word, _ in order[3:]} == {"MUFU.EX2"}, kernel.name
    assert sum(count for _, count in order[3:]) >= 128, kernel.name

    def places(word: str) -> list[int]:
        return [i for i, line in enumerate(kernel.instructions) if line.startswith(word)]

    [older], [complete] = places(WAIT_FOR_OLDER), places(WAIT_FOR_ALL)
    barriers = [i for i in places("MEMBAR") if places("HGMMA")[0] < i < complete]
    assert not barriers, kernel.name
    in_loop, behind = places("SYNCS.ARRIVE.TRANS64.RED")  # a stage is handed back once it was read
    assert older < in_loop < complete < behind, kernel.name


@pytest.mark.parametrize("flags", [(), HANG_FLAG])
def test_linear_logprob(flags: tuple[str, ...]) -> None:
    kernels = compile_cuda(ROOT / "csrc/cuda/linear_logprob/launch.cu", *flags)
    assert len(kernels) == len(LINEAR_LOGPROB) + 2
    for kernel in kernels.values():
        check_clean(kernel)
        if "stored_dlogits" in kernel.name:
            wide = [line.split(",")[0] for line in kernel.instructions if "E.128" in line]
            assert [line[:3] for line in wide] == ["LDG", "STG"]  # 16 bytes per thread at once
            assert kernel.registers <= 32  # 2048 threads per multiprocessor
    for name, boxes in LINEAR_LOGPROB.items():
        [kernel] = [k for n, k in kernels.items() if re.search(rf"\d+{name}", n)]
        operations = kernel.operations
        assert operations["HGMMA"] == 4 and operations["UTMALDG"] == 2, name
        assert sum("UTMALDG.2D.MULTICAST" in line for line in kernel.instructions) == 1, name
        assert (operations.get("UTMASTG", 0), operations.get("STSM", 0)) == (boxes, 4 * boxes), name
        # 24 + 240 + 240 is all that a block starts with
        assert {budget for budget, _ in kernel.roles} == {240, 24}, name
        assert all(used <= budget for budget, used in kernel.roles), f"{name}: {kernel.roles}"
        check_order(kernel)


def check_loop(kernel: CudaKernel, what: str) -> None:
    """The order of the loop: products, a wait that leaves some running, exponentials, a wait for those."""
    order = kernel.order("HGMMA", WAIT_FOR_OLDER, WAIT, "MUFU.EX2")
    waits = sum(count for word, count in order if word in (WAIT, WAIT_FOR_OLDER))
    products = sum(count for word, count in order if word == "HGMMA")
    assert waits <= products // 2, f"{what}: {waits} waits for {products} products"
    # runs of products have several of them: none is waited for alone
    assert all(count >= 4 for word, count in order if word == "HGMMA"), f"{what}: {order}"
    words = [word for word, _ in order]
    last = max(i for i, (word, count) in enumerate(order) if word == "MUFU.EX2" and count >= 32)
    behind = (
        ["HGMMA", WAIT_FOR_OLDER] if "dkv" in what else [WAIT]
    )  # dV is issued while dP^T still runs
    assert words[last - 2 : last] == ["HGMMA", WAIT_FOR_OLDER], f"{what}: {order}"
    assert words[last + 1 : last + 1 + len(behind)] == behind, f"{what}: {order}"


@pytest.mark.parametrize("flags", [(), HANG_FLAG])
def test_packed_attention(flags: tuple[str, ...]) -> None:
    kernels = compile_cuda(ROOT / "csrc/cuda/packed_attention/launch.cu", *flags)
    for head_dim, (fwd, dq, dkv) in {64: (24, 16, 16), 128: (32, 24, 24)}.items():
        expected = {"fwd": fwd, "bwd_dq": dq, "bwd_dkv": dkv, "delta": 0}
        for part, products in expected.items():
            [kernel] = [
                k for n, k in kernels.items() if re.search(rf"attention_{part}ILi{head_dim}E", n)
            ]
            what, operations = f"{part}, head dim {head_dim}", kernel.operations
            check_clean(kernel)
            assert "MEMBAR" not in operations and operations.get("HGMMA", 0) == products, what
            if part == "delta":
                assert any(x.startswith("LDG.E.128") for x in kernel.instructions), what
                continue
            assert operations["UTMALDG"] >= 3 and operations["STSM"] == head_dim // (
                8 if "dkv" in part else 16
            )
            assert any(x.startswith("STG.E.128") for x in kernel.instructions), what
            budgets = [(160, 32)] if (part, head_dim) == ("fwd", 64) else [(240, 24)]
            assert [tuple(budget for budget, _ in kernel.roles)] == budgets, what
            assert all(used <= budget for budget, used in kernel.roles), f"{what}: {kernel.roles}"
            check_loop(kernel, what)


def test_kv_shift_rope() -> None:
    """No spills, 16-byte accesses of the rows, several loads in flight before the first store."""
    kernels = compile_cuda(ROOT / "csrc/cuda/kv_shift_rope/launch.cu")
    (walk,) = (kernel for name, kernel in kernels.items() if "shift_rope_kernel" in name)
    (back,) = (kernel for name, kernel in kernels.items() if "unmix_kernel" in name)
    for kernel, stores, registers in ((walk, 8, 168), (back, 2, 128)):
        check_clean(kernel)
        assert kernel.registers <= registers
        wide_stores = [i for i in kernel.instructions if i.startswith("STG.E.128")]
        assert len(wide_stores) == stores and kernel.operations["STG"] - stores <= 1
        before = next(i for i, text in enumerate(kernel.instructions) if text.startswith("STG"))
        loads = [i for i in kernel.instructions[:before] if i.startswith("LDG.E.128")]
        assert len(loads) >= 8
