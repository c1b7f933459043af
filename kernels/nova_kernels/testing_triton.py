"""What Triton makes of a kernel for a Hopper GPU, read on a machine that need not have one.

Import it in a process without TRITON_INTERPRET: the interpreter's kernels cannot be compiled.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nova_kernels.sass import WARNING, cuobjdump, instructions, mnemonic

HOPPER = GPUTarget("cuda", 90, 32)  # Triton itself asks for sm_90a


@dataclass(frozen=True)
class Compiled:
    registers: int  # per thread
    stack_bytes: int  # per thread: what did not fit into registers
    shared_bytes: int  # per program
    operations: dict[str, int]  # SASS mnemonics without modifiers, and how often each stands there
    warnings: list[str]  # ptxas: among them that it made wgmma wait after every instruction


def compile_for_hopper(
    kernel: Any, arguments: Mapping[str, Any], *, num_warps: int, num_stages: int
) -> Compiled:
    """Compiles a @triton.jit function.

    Args: arguments: one per parameter, in any order. A str is a type ("*bf16", "i32", "fp32",
          "tensordesc<bf16[128, 64]>"), anything else the value of a constexpr. Pointers, and
          strides by their name, count as multiples of 16, as the launcher would find them.
    """
    names = kernel.arg_names
    assert set(names) == set(arguments), set(names) ^ set(arguments)
    types = {n: a if isinstance(a, str) else "constexpr" for n, a in arguments.items()}
    constants = {(names.index(n),): a for n, a in arguments.items() if not isinstance(a, str)}
    aligned = [n for n in names if types[n].startswith("*") or "stride" in n]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},  # pyright: ignore
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # what comes from the cache has no log
        compiled: Any = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = cuobjdump("-res-usage", cubin)
        sass = cuobjdump("-sass", cubin)
    seen = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert seen is not None, usage
    return Compiled(
        registers=int(seen[1]),
        stack_bytes=int(seen[2]),
        shared_bytes=compiled.metadata.shared,
        operations=dict(Counter(map(mnemonic, instructions(sass)))),
        warnings=[line for line in log.getvalue().splitlines() if WARNING.search(line)],
    )
