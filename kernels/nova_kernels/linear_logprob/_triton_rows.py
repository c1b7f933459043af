"""The passes over rows around linear_logprob's products: Triton kernels that every GPU backend launches.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nova_kernels.linear_logprob import _triton_row_kernels as kernels
from nova_kernels.linear_logprob.state import NORM_EPS, Options

INTERPRETED = not isinstance(kernels.sum_rows_kernel, triton.JITFunction)


def sum_rows(dx_RD: Tensor, row_R: Tensor, *, like: Tensor) -> Tensor:
    """(T, D) of `like`'s shape and dtype: each token's sum of its rows, in their order in row_R."""
    out_TD = torch.empty_like(like)
    num_tokens, D = like.shape
    if num_tokens == 0:
        return out_TD
    sorted_R, order_R = torch.sort(row_R, stable=True)
    start_T1 = torch.searchsorted(
        sorted_R, torch.arange(num_tokens + 1, device=row_R.device, dtype=row_R.dtype)
    )
    block_t, block_d = (64, 64) if INTERPRETED else (4, 512)
    kernels.sum_rows_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(D, block_d))](
        dx_RD, order_R, start_T1, out_TD, num_tokens, D=D, BLOCK_T=block_t, BLOCK_D=block_d
    )
    return out_TD


def inverse_norms(weight_VD: Tensor, options: Options, *, multiple: int = 1) -> Tensor | None:
    """1 / length of each valid row of the weight, under NormHead; then zeros up to a multiple."""
    if not options.normalize:
        return None
    padded = -(-options.num_columns // multiple) * multiple
    out_V = torch.zeros(padded, dtype=torch.float32, device=weight_VD.device)
    grid, blocks = _column_blocks(options.num_columns)
    kernels.inverse_norm_kernel[grid](
        weight_VD, out_V, options.num_columns, EPS=NORM_EPS, D=weight_VD.shape[1], **blocks
    )
    return out_V


def project(u_WD: Tensor, weight_WD: Tensor, inverse_norm_W: Tensor, *, out: Tensor) -> None:
    """out = the gradient of the weight from the one of its rows divided by their length."""
    grid, blocks = _column_blocks(len(u_WD))
    kernels.project_kernel[grid](
        u_WD, weight_WD, inverse_norm_W, out, len(u_WD), D=u_WD.shape[1], **blocks
    )


def _column_blocks(num_columns: int) -> tuple[tuple[int], dict[str, int]]:
    block_v = 64 if INTERPRETED else 4
    return (triton.cdiv(num_columns, block_v),), {"BLOCK_V": block_v, "BLOCK_D": 512}
