"""Compiles kv_shift_rope's Triton kernels for sm_90 and prints what came out, one line of JSON each.

python tests/kernels/compile_kv_shift_rope.py [--all]     without --all only 32/8 heads of 128
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import product
from typing import Any

import torch
import triton

from nova_kernels.kv_shift_rope._triton import _Split
from nova_kernels.kv_shift_rope._triton_kernels import bwd_kernel, fwd_kernel
from nova_kernels.kv_shift_rope.state import Options
from nova_kernels.testing_triton import compile_for_hopper

TYPES: dict[str, str] = dict.fromkeys(("p_cos", "p_sin", "p_partial", "p_norm_partial"), "*fp32")
TYPES |= {"eps": "fp32"}
TYPES |= dict.fromkeys(("p_position", "p_previous"), "*i64")
TYPES |= dict.fromkeys(("p_offset", "p_successor"), "*i32")
OF_MIXING = {"p_k_mix", "p_v_mix", "p_v_out", "p_dv_out", "p_dv"}
OF_NORMS = {"p_q_norm", "p_k_norm"}


def arguments(kernel: Any, constants: dict, mixes: bool, norms: bool) -> dict:
    absent = (set() if mixes else OF_MIXING) | (set() if norms else OF_NORMS)
    if kernel is bwd_kernel:  # what it needs no raw input of
        absent |= set() if mixes else {"p_v"}
        absent |= set() if mixes or norms else {"p_k"}
        absent |= set() if norms else {"p_q"}
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
    kinds = [(True, False), (False, False), (True, True)]  # mixes, norms
    kinds += [(False, True)] if "--all" in sys.argv else []
    for (N, K, H, F, interleaved), (mixes, norms) in product(shapes, kinds):
        heads = (torch.empty(8192, X, H, device="meta") for X in (N, K))
        split = _Split(*heads, with_v=mixes)
        options = Options(interleaved, norm_eps=1e-6, inplace_q=False)
        for kernel in (fwd_kernel, bwd_kernel):
            more = {"N": N} if kernel is bwd_kernel else {}
            constants = split.constants(torch.empty(10, F), options, **more)
            compiled = compile_for_hopper(
                kernel, arguments(kernel, constants, mixes, norms), num_warps=4, num_stages=3
            )
            record = {"name": f"{N}/{K} heads of {H}, {2 * F} dims rotate, {mixes=}, {norms=}"}
            record |= {"kernel": kernel.__name__, "interleaved": interleaved}
            record |= {"triton": triton.__version__} | dataclasses.asdict(compiled)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
