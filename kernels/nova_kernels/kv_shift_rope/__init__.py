"""KV shifting, rotary positions and norms of q and k over a pack of segments (docs: README.md in this folder).

Legend: T packed tokens, S segments, N query heads, K key/value heads, H head dim, P table rows,
F rotary_dim / 2.
"""

from __future__ import annotations

import math

import torch

from nova_kernels.backend import cuda_runs_on, resolve, triton_runs_on
from nova_kernels.checks import check_dtype, check_same_device, check_shape
from nova_kernels.kv_shift_rope._cuda import broken_rule, kv_shift_rope_cuda
from nova_kernels.kv_shift_rope.reference import shift_rope
from nova_kernels.kv_shift_rope.state import Options, Weights, check_inplace
from nova_kernels.ranges import ranged
from nova_kernels.segments import SegmentIndex, schedule_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUSED_DTYPES = _DTYPES[:3]


@ranged("nova_kernels.kv_shift_rope")
def kv_shift_rope(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    segments_S4: torch.Tensor,
    k_mix_K2: torch.Tensor | None,
    v_mix_K2: torch.Tensor | None,
    cos_PF: torch.Tensor,
    sin_PF: torch.Tensor,
    *,
    q_norm_H: torch.Tensor | None = None,
    k_norm_H: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    interleaved: bool = False,
    inplace_q: bool = False,
    schedule: SegmentIndex | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixes keys and values with the previous token's, then rotates queries and keys.

    k'[t] = k_mix[:, 1] * k[t] + k_mix[:, 0] * k[prev(t)], v' likewise (arXiv 2411.19574), with
    prev as in segments.py and a zero vector where there is none; then RoPE at segment positions:
    q'[t] = R(position[t]) q[t],  k''[t] = R(position[t]) k'[t].
    With norm weights, q and k stand for rmsnorm(q) and rmsnorm(k) in these lines, per head:
    rmsnorm(x) = x / sqrt(mean(x^2) + norm_eps) * norm_H.

    Args:     q_TNH (T, N, H), k_TKH and v_TKH (T, K, H), one of fp32|bf16|fp16|fp64.
              segments_S4 (S, 4) int32, see segments.py. k_mix_K2, v_mix_K2 (K, 2), column 0 weighs
              the previous token and column 1 the current one; None leaves keys or values unmixed.
              cos_PF, sin_PF (P, F) fp32, see `rope_tables`; the first 2 F dims of a head rotate,
              the rest pass. q_norm_H, k_norm_H (H,): weights of the norms; None: no norm.
              interleaved: pairs are dims (2i, 2i + 1), not (i, i + F).
              inplace_q: q' is written into q_TNH, and the q returned is that very tensor, at a new
              version: what saved q_TNH before for its own backward will raise there, and what uses
              q_TNH afterwards sees q', for values and gradients alike.
              schedule: `segment_index` of the same table, to derive it once per pack.
    Returns:  q, k, v of the input's dtype, computed in at least fp32 and rounded once. v is the
              input itself when v_mix_K2 is None.
    Gradients: q_TNH, k_TKH, v_TKH, the mixes and the norm weights; bit-identical from run to run.
              The weights' gradients sum over every row, so rows of padding must be finite; under
              tensor parallelism they are this rank's heads' part.
    Collectives: none.   Memory: keeps its inputs q, k, v for the backward where they are mixed or
              normalised.
    Raises:   ValueError when shapes, dtypes, devices or the table break a rule, when the tables
              have fewer rows than the longest sequence has positions, or when q cannot be written
              in place (state.py: memory shared with k or v; with a gradient: leaves, views, a norm).
    """
    weights = Weights(k_mix_K2, v_mix_K2, q_norm_H, k_norm_H)
    _check_tensors(q_TNH, k_TKH, v_TKH, weights, norm_eps)
    index = schedule_of(schedule, segments_S4, len(q_TNH))
    _check_tables(cos_PF, sin_PF, q_TNH.shape[2], index.num_positions)
    check_same_device(
        q_TNH=q_TNH, k_TKH=k_TKH, v_TKH=v_TKH, cos_PF=cos_PF, sin_PF=sin_PF,
        position_T=index.position_T, **weights._asdict(),
    )  # fmt: skip
    if inplace_q:
        check_inplace(q_TNH, k_TKH, v_TKH, q_norm_H)
    options = Options(interleaved, norm_eps, inplace_q)
    chosen = _backend(backend, q_TNH, cos_PF, weights)
    if chosen == "triton":
        from nova_kernels.kv_shift_rope._triton import kv_shift_rope_triton

        return kv_shift_rope_triton(q_TNH, k_TKH, v_TKH, weights, (cos_PF, sin_PF), index, options)
    if chosen == "cuda":
        return kv_shift_rope_cuda(q_TNH, k_TKH, v_TKH, weights, (cos_PF, sin_PF), index, options)
    position_T = index.position_T
    tables = (cos_PF.index_select(0, position_T), sin_PF.index_select(0, position_T))
    fresh = options._replace(inplace_q=False)
    return (
        shift_rope(q_TNH, None, q_norm_H, tables, index, options),
        shift_rope(k_TKH, k_mix_K2, k_norm_H, tables, index, fresh),
        shift_rope(v_TKH, v_mix_K2, None, None, index, fresh),
    )


def _backend(requested: str, q_TNH: torch.Tensor, cos_PF: torch.Tensor, weights: Weights) -> str:
    """ "auto" takes the reference until the others have passed their tests on a GPU."""
    available, why = ["reference"], ""
    if triton_runs_on(q_TNH.device) and q_TNH.dtype in _FUSED_DTYPES:
        available.append("triton")
    if not cuda_runs_on(q_TNH.device):
        why = "cuda needs a Hopper GPU, and the extension built with nvcc"
    else:
        why = broken_rule(q_TNH, cos_PF, weights)
        available += [] if why else ["cuda"]
    return resolve("kv_shift_rope", requested, available, why=why)


def rope_tables(
    num_positions: int, rotary_dim: int, base: float = 10_000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (num_positions, rotary_dim / 2) of position * base**(-2i / rotary_dim).

    Computed in fp64 and rounded once to fp32: an fp32 angle near 10^5 alone is off by
    up to 0.004 radians.
    """
    if rotary_dim % 2 or rotary_dim <= 0:
        raise ValueError(
            f"rotary_dim is {rotary_dim}, but RoPE turns pairs of dims. Give a positive even number."
        )
    exponent_F = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    position_P = torch.arange(num_positions, dtype=torch.float64)
    angle_PF = torch.outer(position_P, base**-exponent_F)
    return angle_PF.cos().float(), angle_PF.sin().float()


def _check_tensors(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    weights: Weights,
    norm_eps: float,
) -> None:
    check_shape("q_TNH", q_TNH, ("T", "N", "H"))
    T, _, H = q_TNH.shape
    check_shape("k_TKH", k_TKH, (T, "K", H))
    check_shape("v_TKH", v_TKH, tuple(k_TKH.shape))
    check_dtype("q_TNH", q_TNH, _DTYPES)
    for name, tensor in (("k_TKH", k_TKH), ("v_TKH", v_TKH)):
        check_dtype(name, tensor, (q_TNH.dtype,))
    for name, weight in weights._asdict().items():
        if weight is not None:
            check_shape(name, weight, (H,) if name.endswith("H") else (k_TKH.shape[1], 2))
            check_dtype(name, weight, _DTYPES)
    if not (math.isfinite(norm_eps) and norm_eps > 0):
        raise ValueError(
            f"norm_eps is {norm_eps}, but must be positive and finite: a row of zeros is divided by its root. "
            "Qwen3 takes 1e-6."
        )


def _check_tables(
    cos_PF: torch.Tensor, sin_PF: torch.Tensor, head_dim: int, num_positions: int
) -> None:
    check_shape("cos_PF", cos_PF, ("P", "F"))
    check_shape("sin_PF", sin_PF, tuple(cos_PF.shape))
    check_dtype("cos_PF", cos_PF, (torch.float32,))
    check_dtype("sin_PF", sin_PF, (torch.float32,))
    rows, half = cos_PF.shape
    if 2 * half > head_dim:
        raise ValueError(
            f"cos_PF has {half} columns, so {2 * half} dims would rotate, but a head has {head_dim}. "
            f"Build the tables with rotary_dim <= {head_dim}."
        )
    if rows < num_positions:
        raise ValueError(
            f"cos_PF has {rows} rows, but this pack has positions up to {num_positions - 1}. "
            f"Build the tables with rope_tables(num_positions={num_positions}, ...) or more."
        )
