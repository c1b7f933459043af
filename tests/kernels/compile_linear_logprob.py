"""Compiles linear_logprob's Triton kernels for sm_90 and prints what came out, one line of JSON each.

python tests/kernels/compile_linear_logprob.py [--all]     without --all only what training runs
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import triton

from nova_kernels.linear_logprob import _triton_kernels as kernels
from nova_kernels.linear_logprob import _triton_row_kernels as row_kernels
from nova_kernels.linear_logprob._triton_tiles import RULES, Tile, choose_tile
from nova_kernels.testing_triton import compile_for_hopper

INTEGERS = dict.fromkeys(kernels.NEVER_SPECIALIZED, "i32")


def fold(tile: Tile, *, D: int, store: bool, entropy: bool, argmax: bool, norm: bool) -> dict:
    return {
        "p_hidden": "*bf16",
        "w_desc": f"tensordesc<bf16[{tile.columns}, {tile.depth}]>",
        "e_desc": f"tensordesc<bf16[{tile.rows}, {tile.columns // 2}]>" if store else None,
        "p_row": "*i64",
        "p_target": "*i64",
        "p_inverse_norm": "*fp32" if norm else None,
        "p_state": "*fp32",
        "p_tile_max": "*fp32" if store else None,
        "inverse_temperature": "fp32",
        "ENTROPY": entropy,
        "ARGMAX": argmax,
        "SPLITS": 4,
        "GROUP": 32,
        **blocks(tile, D),
    }


def dlogits(tile: Tile, *, D: int, entropy: bool, maximum: bool, norm: bool) -> dict:
    return {
        "p_hidden": "*bf16",
        "w_desc": f"tensordesc<bf16[{tile.columns}, {tile.depth}]>",
        "dz_desc": f"tensordesc<bf16[{tile.rows}, {tile.columns // 2}]>",
        "p_row": "*i64",
        "p_target": "*i64",
        "p_inverse_norm": "*fp32" if norm else None,
        "p_rows": "*fp32",
        "inverse_temperature": "fp32",
        "ENTROPY": entropy,
        "MAX": maximum,
        "GROUP": 16,
        **blocks(tile, D),
    }


def blocks(tile: Tile, D: int) -> dict:
    sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    return {"D": D, "UPCAST": False} | sizes


def products(everything: bool) -> Iterator[tuple[str, Any, dict, Tile]]:
    """The two kernels around the product, in the tiles that the table gives them."""
    flags = (False, True) if everything else (False,)
    for D in (4096, 3584, 1000) if everything else (4096,):
        for num_rows in (64, 8192):
            for norm in flags:
                for entropy in flags:
                    for top in flags:
                        names = [
                            n
                            for n, on in (("norm", norm), ("entropy", entropy), ("max", top))
                            if on
                        ]
                        options = " ".join([f"D={D}", *names])
                        for store in (False, True):
                            tile = choose_tile(num_rows, 2, crowded=store and (entropy or top))
                            arguments = fold(
                                tile, D=D, store=store, entropy=entropy, argmax=top, norm=norm
                            )
                            plan = "fold, store" if store else "fold"
                            yield f"{plan}, {options}", kernels.fold_kernel, arguments, tile
                        tile = choose_tile(num_rows, 2, crowded=False)
                        arguments = dlogits(tile, D=D, entropy=entropy, maximum=top, norm=norm)
                        yield f"dlogits, {options}", kernels.dlogits_kernel, arguments, tile


def passes(everything: bool) -> Iterator[tuple[str, Any, dict, Tile]]:
    """The kernels that multiply nothing; of the tile only columns, warps and stages count."""
    for half in sorted({rule.tile.columns // 2 for rule in RULES if rule.itemsize == 2}):
        for top in (False, True) if everything else (False,):
            arguments = {
                "p_e": "*bf16", "p_dz": "*bf16", "p_tile_max": "*fp32", "p_target": "*i64",
                "p_inverse_norm": "*fp32" if top else None, "p_rows": "*fp32",
                "stride_e": "i32", "stride_dz": "i32", "ENTROPY": top, "MAX": top,
                "BLOCK_M": 16, "BLOCK_N": half,
            }  # fmt: skip
            tile = Tile(16, half, 0, 4, 3)
            yield (
                "stored dlogits" + " everything" * top,
                kernels.stored_dlogits_kernel,
                arguments,
                tile,
            )
    arguments = {
        "p_dx": "*fp32", "p_order": "*i64", "p_start": "*i64", "p_dhidden": "*bf16",
        "num_tokens": "i32", "D": 4096, "BLOCK_T": 4, "BLOCK_D": 512,
    }  # fmt: skip
    yield "sum rows", row_kernels.sum_rows_kernel, arguments, Tile(4, 512, 0, 4, 3)
    sizes = {"num_columns": "i32", "D": 4096, "BLOCK_V": 4, "BLOCK_D": 512}
    arguments = {"p_weight": "*bf16", "p_out": "*fp32", "EPS": 1e-12} | sizes
    yield "inverse norm", row_kernels.inverse_norm_kernel, arguments, Tile(4, 512, 0, 4, 3)
    arguments = {
        "p_u": "*fp32",
        "p_weight": "*bf16",
        "p_inverse_norm": "*fp32",
        "p_dweight": "*bf16",
    }
    yield "project", row_kernels.project_kernel, arguments | sizes, Tile(4, 512, 0, 4, 3)


def main() -> None:
    everything = "--all" in sys.argv
    for name, kernel, arguments, tile in [*products(everything), *passes(everything)]:
        scalars = {n: t for n, t in INTEGERS.items() if n in kernel.arg_names}
        compiled = compile_for_hopper(
            kernel, scalars | arguments, num_warps=tile.warps, num_stages=tile.stages
        )
        record = {
            "name": name,
            "kernel": kernel.__name__,
            "tile": tile,
            "triton": triton.__version__,
        }
        print(json.dumps(record | dataclasses.asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
