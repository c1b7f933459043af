"""Attention over a pack of segments with shared prefixes (docs: README.md in this folder).

Legend: T packed tokens, S segments, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from nova_kernels.backend import cuda_runs_on, resolve, triton_runs_on
from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.packed_attention._cuda import broken_rule, packed_attention_cuda
from nova_kernels.packed_attention.reference import blocked_attention
from nova_kernels.ranges import ranged
from nova_kernels.segments import SegmentIndex, schedule_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUSED_DTYPES = {  # the interpreter has no bf16 products, and tensor cores none of fp32
    "cuda": (torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.float16),
}
MAX_FUSED_HEAD_DIM = 256


@overload
def packed_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    segments_S4: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    window: int = 0,
    schedule: SegmentIndex | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def packed_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    segments_S4: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    window: int = 0,
    schedule: SegmentIndex | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


@ranged("nova_kernels.packed_attention")
def packed_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    segments_S4: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    window: int = 0,
    schedule: SegmentIndex | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which each token sees its own segment causally, and its prefix whole.

    out[q] = sum_j p[q, j] v[j],   p[q] = softmax over allowed j of (scale * <q[q], k[j]>)
    allowed: same segment and j <= q, or prefix_start[segment of q] <= j < prefix_end[segment of q];
             with a window also position[q] - position[j] < window, positions as in segments.py

    Args:     q_TNH (T, N, H), k_TKH and v_TKH (T, K, H), one of fp32|bf16|fp16|fp64; N a multiple
              of K, query head n reads key head n // (N / K). segments_S4 (S, 4) int32, see
              segments.py. softmax_scale: 1 / sqrt(H) by default. window: tokens that a token sees,
              itself included; 0: no limit. schedule: `segment_index` of the same table, to derive
              it once per pack instead of once per call.
    Returns:  out_TNH of q's dtype; with return_lse also lse_TN (T, N), the natural log-sum-exp of
              the scaled scores, fp32 (fp64 for fp64 inputs), without gradient.
    Gradients: q_TNH, k_TKH, v_TKH; bit-identical from run to run.   Collectives: none.
    Memory:   O(T), never T x T; the reference keeps at most 64 MiB of probabilities per call.
    Raises:   ValueError when shapes, dtypes, devices or the table break a rule.
    """
    check_shape("q_TNH", q_TNH, ("T", "N", "H"))
    T, N, H = q_TNH.shape
    check_shape("k_TKH", k_TKH, (T, "K", H))
    check_shape("v_TKH", v_TKH, tuple(k_TKH.shape))
    check_dtype("q_TNH", q_TNH, _DTYPES)
    check_dtype("k_TKH", k_TKH, (q_TNH.dtype,))
    check_dtype("v_TKH", v_TKH, (q_TNH.dtype,))
    check_same_device(q_TNH=q_TNH, k_TKH=k_TKH, v_TKH=v_TKH)
    K = k_TKH.shape[1]
    if K == 0 or N % K:
        raise ValueError(
            f"q_TNH has {N} heads and k_TKH has {K}, but every key head serves the same number of "
            f"query heads. Make N a multiple of K."
        )
    if window < 0:
        raise ValueError(
            f"window is {window}, but it counts the tokens that a token sees, itself included. "
            f"Give 1 or more, or 0 for no limit."
        )
    index = schedule_of(schedule, segments_S4, T)
    if window and index.num_positions <= window:
        window = 0  # nothing in this pack is that far away
    scale = H**-0.5 if softmax_scale is None else softmax_scale
    # "auto" takes the first, the reference, until the fused kernels have passed their tests on a GPU.
    fused = triton_runs_on(q_TNH.device) and q_TNH.dtype in _FUSED_DTYPES[q_TNH.device.type]
    broken = broken_rule(q_TNH, softmax_scale=scale, window=window)
    if not cuda_runs_on(q_TNH.device):
        broken = "cuda needs a Hopper GPU (sm_90), and the extension built with a CUDA compiler"
    available = ["reference"]
    available += ["triton"] if fused and H <= MAX_FUSED_HEAD_DIM else []
    available += [] if broken else ["cuda"]
    chosen = resolve(
        "packed_attention", backend, available, why=broken if backend == "cuda" else ""
    )
    if chosen != "reference":  # kernels read lists of tiles, which stand where the table stands
        check_same_device(q_TNH=q_TNH, segments_S4_or_schedule=index.position_T)
    if chosen == "triton":
        from nova_kernels.packed_attention._triton import packed_attention_triton

        out_TNH, lse_TN = packed_attention_triton(
            q_TNH, k_TKH, v_TKH, index, softmax_scale=scale, window=window
        )
    elif chosen == "cuda":
        out_TNH, lse_TN = packed_attention_cuda(q_TNH, k_TKH, v_TKH, index, softmax_scale=scale)
    else:
        out_TNH, lse_TN = blocked_attention(
            q_TNH,
            k_TKH,
            v_TKH,
            index.host_segments,
            softmax_scale=scale,
            window=window,
            return_lse=return_lse,
        )
    return (out_TNH, lse_TN) if return_lse and lse_TN is not None else out_TNH
