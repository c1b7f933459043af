"""Compiles kv_shift_rope's Triton kernels for sm_90 and prints what came out, one line of JSON each.

python tests/kernels/compile_kv_shift_rope.py [--all]     without --all only 32/8 heads of 128
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
import triton

from nova_kernels.kv_shift_rope._triton import _Split
from nova_kernels.kv_shift_rope._triton_kernels import bwd_kernel, fwd_kernel
from nova_kernels.testing_triton import compile_for_hopper

TYPES = dict.fromkeys(("p_cos", "p_sin", "p_partial"), "*fp32")
TYPES |= dict.fromkeys(("p_position", "p_previous"), "*i64")
TYPES |= dict.fromkeys(("p_offset", "p_successor"), "*i32")
OF_MIXING = {"p_k_mix", "p_v_mix", "p_v_out", "p_dv_out", "p_dv"}


def arguments(kernel: Any, constants: dict, mixes: bool) -> dict:
    absent = set() if mixes else OF_MIXING | ({"p_k", "p_v"} if kernel is bwd_kernel else set())
    given = {}
    for name in kernel.arg_names:
        kind = "*bf16" if name.startswith("p_") else "i32"
        given[name] = None if name in absent else constants.get(name, TYPES.get(name, kind))
    return given


def main() -> None:
    shapes = [(32, 8, 128, 64, False)]
    if "--all" in sys.argv:
        shapes += [(16, 4, 64, 32, False), (8, 8, 96, 48, False), (4, 1, 256, 128, False)]
        shapes += [(32, 8, 128, 32, True), (12, 4, 128, 16, False)]
    for N, K, H, F, interleaved in shapes:
        for mixes in (True, False):
            heads = (torch.empty(8192, X, H, device="meta") for X in (N, K))
            split = _Split(*heads, with_v=mixes)
            constants = split.constants(torch.empty(10, F), interleaved)
            for kernel in (fwd_kernel, bwd_kernel):
                compiled = compile_for_hopper(
                    kernel, arguments(kernel, constants, mixes), num_warps=4, num_stages=3
                )
                record = {"name": f"{N}/{K} heads of {H}, {2 * F} dims rotate, mixes={mixes}"}
                record |= {"kernel": kernel.__name__, "interleaved": interleaved}
                record |= {"triton": triton.__version__} | dataclasses.asdict(compiled)
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
