"""Compiles packed_attention's Triton kernels for sm_90 and prints what came out, one line of JSON each.

python tests/kernels/compile_packed_attention.py [--all]     without --all only head dim 128
"""

from __future__ import annotations

import dataclasses
import json
import sys

import triton

from nova_kernels.packed_attention._triton import Tile, tiles_of
from nova_kernels.packed_attention._triton_kernels import dkv_kernel, dq_kernel, fwd_kernel
from nova_kernels.testing_triton import compile_for_hopper

WINDOWED = [(128, 4, 4096), (128, 5, 8192)]
"""Head dim, group, window; the second is Baichuan-M1-14B's."""
KERNELS = {"fwd": fwd_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
TYPES = {
    "p_lse": "*fp32",
    "p_delta": "*fp32",
    "p_tiles": "*i32",
    "num_heads": "i32",
    "scale": "fp32",
    "softmax_scale": "fp32",
}


def arguments(kernel: object, tile: Tile, head_dim: int, group: int, window: int) -> dict:
    """As `_Call` passes them."""
    pack = group if tile.pack and group in (2, 4, 8, 16) else 1
    block_h = max(64, triton.next_power_of_2(head_dim))
    flat = head_dim == block_h
    rows = f"{tile.rows}, {block_h}" if flat and pack == 1 else f"{tile.rows // pack}, {pack}, {block_h}"  # fmt: skip
    keys = f"{tile.keys}, {block_h}" if flat else f"{tile.keys}, 1, {block_h}"
    constants = {"GROUP": group, "PACK": pack, "H": head_dim}
    constants |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_H": block_h}
    constants |= {"WINDOW": window, "p_position": "*i64" if window else None}
    given = {}
    for name in kernel.arg_names:
        if name in ("k_desc", "v_desc"):
            given[name] = f"tensordesc<bf16[{keys}]>"
        elif name.endswith("_desc"):
            given[name] = f"tensordesc<bf16[{rows}]>"
        else:
            given[name] = constants.get(name, TYPES.get(name, "*bf16"))
    return given


def main() -> None:
    everything = "--all" in sys.argv
    head_dims, groups = ((64, 96, 128, 192, 256), (1, 3, 4, 8)) if everything else ((128,), (4,))
    shapes = [(head_dim, group, 0) for head_dim in head_dims for group in groups]
    for head_dim, group, window in [*shapes, *(WINDOWED if everything else WINDOWED[:1])]:
        for name, kernel in KERNELS.items():
            tile = getattr(tiles_of(head_dim), name)
            compiled = compile_for_hopper(
                kernel,
                arguments(kernel, tile, head_dim, group, window),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            windowed = f", window {window}" if window else ""
            record = {"name": f"{name}, head dim {head_dim}, group {group}{windowed}"}
            record |= {"kernel": name, "head_dim": head_dim, "window": window}
            record |= {"tile": dataclasses.astuple(tile), "triton": triton.__version__}
            print(json.dumps(record | dataclasses.asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
