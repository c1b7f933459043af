"""What nvcc makes of a CUDA kernel for Hopper GPUs, read on a machine that need not have one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nova_kernels.sass import cuobjdump, instructions, mnemonic

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v,-warn-spills"]
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_NOTE = re.compile(r"\((C7\d\d\d)\)")
_REGISTER = re.compile(r"\bR(\d+)")


@dataclass(frozen=True)
class CudaKernel:
    name: str  # mangled
    spill_bytes: int  # stack frame, spill stores and loads, per thread
    registers: int  # per thread, of the whole kernel
    roles: tuple[tuple[int, int], ...]
    """Of each warpgroup role: the registers its `setmaxnreg` asks for, and those it uses."""
    operations: dict[str, int]  # SASS mnemonics without modifiers, and how often each stands there
    instructions: tuple[str, ...]
    notes: tuple[
        str, ...
    ]  # ptxas codes; C7510 and C7512: it made wgmma wait after every instruction

    def order(self, *wanted: str) -> list[tuple[str, int]]:
        """Runs of the instructions that begin with one of the words: [("HGMMA", 4), ("MUFU.EX2", 64), ...]."""
        runs: list[tuple[str, int]] = []
        for instruction in self.instructions:
            word = next((word for word in wanted if instruction.startswith(word)), None)
            if word is not None and runs and runs[-1][0] == word:
                runs[-1] = (word, runs[-1][1] + 1)
            elif word is not None:
                runs.append((word, 1))
        return runs


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


def compile_cuda(source: Path, *flags: str) -> dict[str, CudaKernel]:
    """Compiles a .cu file of csrc for sm_90a; one entry per kernel, by mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", *FLAGS, *flags, "-I", ROOT / "csrc", "-cubin", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        sass = cuobjdump("-sass", cubin)
    spills: dict[str, int] = {}
    kernel = ""
    for line in done.stderr.splitlines():
        named = re.search(r"Function properties for (\S+)", line)
        kernel = named[1] if named else kernel
        if seen := _SPILLS.search(line):
            spills[kernel] = sum(map(int, seen.groups()))
    notes = [(line, code) for line in done.stderr.splitlines() for code in _NOTE.findall(line)]
    kernels = {}
    for part in sass.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        name = name.strip()
        about = tuple(code for line, code in notes if name in line)
        kernels[name] = _read(name, spills[name], instructions(body), about)
    return kernels


def _read(name: str, spill_bytes: int, found: list[str], notes: tuple[str, ...]) -> CudaKernel:
    starts = [i for i, line in enumerate(found) if line.startswith("USETMAXREG")]
    roles = []
    for first, last in zip(starts, [*starts[1:], len(found)], strict=False):
        part = found[first:last]
        # Behind a role's last EXIT stand the spin loops and slow paths of all roles.
        end = max((i for i, line in enumerate(part) if line.startswith("EXIT")), default=len(part))
        roles.append((int(part[0].split()[-1], 16), _registers(part[:end])))
    operations = dict(Counter(map(mnemonic, found)))
    return CudaKernel(
        name, spill_bytes, _registers(found), tuple(roles), operations, tuple(found), notes
    )


def _registers(lines: list[str]) -> int:
    return 1 + max((int(n) for line in lines for n in _REGISTER.findall(line)), default=-1)
