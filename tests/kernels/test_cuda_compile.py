"""What nvcc makes of our CUDA kernels for sm_90a: registers, spills, and the order of the instructions; needs no GPU."""

from __future__ import annotations

import re

import pytest

from nova_kernels.testing_cuda import ROOT, CudaKernel, compile_cuda, has_nvcc

pytestmark = pytest.mark.skipif(not has_nvcc(), reason="no CUDA compiler")
HANG_FLAG = pytest.param(("-DNOVA_HANG_FLAG",), marks=pytest.mark.slow)
WAIT_FOR_ALL, WAIT_FOR_OLDER = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
LINEAR_LOGPROB = {  # kernel<flags>: boxes that it stores
    "fold_kernelILb0ELb0E": 0,
    "fold_kernelILb0ELb1E": 4,
    "fold_kernelILb1ELb0E": 0,
    "fold_kernelILb1ELb1E": 4,
    "dlogits_kernelILb0E": 4,
    "dlogits_kernelILb1E": 4,
}


def registers_of_roles(kernel: CudaKernel) -> dict[int, int]:
    """Register budget of each role -> registers that it uses.

    A role ends with the last jump or exit of its part that stands before the next `setmaxnreg`;
    behind the kernel's exit stand the spin loops of all roles.
    """
    lines = list(kernel.instructions)
    lines = lines[: max(i for i, line in enumerate(lines) if line.startswith("EXIT"))]
    starts = [i for i, line in enumerate(lines) if line.startswith("USETMAXREG")]
    used = {}
    for first, last in zip(starts, [*starts[1:], len(lines)], strict=True):
        numbers = [int(r) for line in lines[first:last] for r in re.findall(r"\bR(\d+)", line)]
        used[int(lines[first].split()[-1], 16)] = 1 + max(numbers)
    return used


def check_clean(kernel: CudaKernel) -> None:
    assert kernel.spill_bytes == 0 and not {"LDL", "STL"} & set(kernel.operations), kernel.name
    assert not {"C7510", "C7512"} & set(kernel.notes), kernel.name  # wgmma serialised
    assert "HMMA" not in kernel.operations, kernel.name  # the matrix unit of older GPUs
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
            assert kernel.registers[0] < 32  # 2048 threads per multiprocessor
    for name, boxes in LINEAR_LOGPROB.items():
        [kernel] = [k for n, k in kernels.items() if re.search(rf"\d+{name}", n)]
        operations = kernel.operations
        assert operations["HGMMA"] == 4 and operations["UTMALDG"] == 2, name
        assert sum("UTMALDG.2D.MULTICAST" in line for line in kernel.instructions) == 1, name
        assert (operations.get("UTMASTG", 0), operations.get("STSM", 0)) == (boxes, 4 * boxes), name
        used = registers_of_roles(kernel)
        assert set(used) == {240, 24}, name  # 24 + 240 + 240 is all that a block starts with
        assert all(count <= budget for budget, count in used.items()), f"{name}: {used}"
        check_order(kernel)
