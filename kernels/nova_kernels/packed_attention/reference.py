"""Packed attention in plain PyTorch: an exact dense form for tests, and the blocked CPU path.

Legend: T packed tokens, S segments, N query heads, K key/value heads, H head dim, g = N / K.
The blocked path treats one segment after the other, in blocks of query rows. The g query heads of
one key/value head become g rows of one matrix, so grouped keys are never repeated:

    score_KRL    R = block rows * g, L = prefix keys + own keys up to the block's last row
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from nova_kernels.ranges import ranged
from nova_kernels.segments import HostSegments, positions, segment_ids

# Query rows per block. Smaller wastes fewer masked scores, larger makes better GEMMs; for 29
# segments in T=2048, N=8, K=4, H=32, fp32, forward + backward on one core took
# 24.2 | 21.9 | 22.6 | 24.9 | 29.0 ms with 48 | 64 | 96 | 128 | 256 rows.
BLOCK_ROWS = 64

# Probabilities kept for the backward pass, per call. Beyond that the backward computes them again,
# which keeps the memory linear in T. Packs of hh-rlhf documents need 9 MiB per 2048 tokens.
KEEP_BYTES = 64 * 2**20


def attention_mask(segments_S4: torch.Tensor, T: int, window: int = 0) -> torch.Tensor:
    """allowed[q, j] (T, T) bool: same segment and j <= q, or j in the prefix of q's segment; and,
    with a window, position[q] - position[j] < window."""
    segment_T = segment_ids(segments_S4, T)
    token_T = torch.arange(T, device=segments_S4.device)
    _, _, prefix_start_T, prefix_end_T = segments_S4.long()[segment_T].unbind(1)
    own = (segment_T[:, None] == segment_T) & (token_T <= token_T[:, None])
    allowed = own | ((prefix_start_T[:, None] <= token_T) & (token_T < prefix_end_T[:, None]))
    if window:
        position_T = positions(segments_S4, T)
        allowed &= position_T[:, None] - position_T < window
    return allowed


def dense_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    segments_S4: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in the input's dtype, with a T x T mask: for tests on small packs.

    Returns:  out_TNH, lse_TN (log-sum-exp of the scaled scores), both of the input's dtype.
    """
    T, N, H = q_TNH.shape
    group = N // k_TKH.shape[1]
    scale = H**-0.5 if softmax_scale is None else softmax_scale
    k_TNH, v_TNH = (x.repeat_interleave(group, dim=1) for x in (k_TKH, v_TKH))
    score_NTT = torch.einsum("qnh,jnh->nqj", q_TNH, k_TNH) * scale
    score_NTT = score_NTT.masked_fill(~attention_mask(segments_S4, T, window), -torch.inf)
    out_TNH = torch.einsum("nqj,jnh->qnh", score_NTT.softmax(dim=-1), v_TNH)
    return out_TNH, score_NTT.logsumexp(dim=-1).T


def blocked_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    host_segments: HostSegments,
    *,
    softmax_scale: float,
    window: int = 0,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The path training on a CPU takes: no T x T matrix, at least fp32 inside.

    Returns:  out_TNH of q's dtype; lse_TN fp32 (fp64 for fp64 inputs), without gradient, or None.
    """
    keep_bytes = KEEP_BYTES if torch.is_grad_enabled() else 0
    plan = _Plan(_blocks(host_segments, window), softmax_scale, window)
    return _BlockedAttention.apply(q_TNH, k_TKH, v_TKH, plan, keep_bytes, return_lse)


Block = tuple[int, int, int, int, int]  # query rows lo, hi; own keys from; prefix start and end


class _Plan(NamedTuple):
    blocks: list[Block]
    softmax_scale: float
    window: int


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: _Plan,
        keep_bytes: int,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        (T, N, H), K = q_TNH.shape, k_TKH.shape[1]
        q, key_TKH, value_TKH = _wide(q_TNH), _wide(k_TKH) * plan.softmax_scale, _wide(v_TKH)
        masks = _masks(N // K, q)
        out_TNH = q_TNH.new_empty(T, N, H)
        lse_TN = q.new_empty(T, N) if return_lse else None
        queries: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for block in plan.blocks:
            lo, hi = block[:2]
            q_KRH = _fold(q[lo:hi], K)
            score_KRL = _scores(q_KRH, _keys(key_TKH, block), masks, hi - lo, plan.window)
            p_KRL = score_KRL.softmax(dim=-1)
            out_KRH = torch.bmm(p_KRL, _keys(value_TKH, block).transpose(0, 1))
            _unfold_into(out_TNH[lo:hi], out_KRH)
            if lse_TN is not None:
                _unfold_into(lse_TN[lo:hi, :, None], score_KRL.logsumexp(dim=-1, keepdim=True))
            queries.append(q_KRH)
            keep_bytes -= p_KRL.nbytes
            if keep_bytes >= 0:
                kept.append(p_KRL)
        ctx.save_for_backward(k_TKH, v_TKH, *queries, *kept)
        ctx.plan, ctx.dtype = plan, q_TNH.dtype
        if lse_TN is not None:
            ctx.mark_non_differentiable(lse_TN)
        return out_TNH, lse_TN

    @staticmethod
    @once_differentiable
    @ranged("nova_kernels.packed_attention.backward")
    def backward(ctx: Any, dout_TNH: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        k_TKH, v_TKH, *saved = ctx.saved_tensors
        plan: _Plan = ctx.plan
        queries, kept = saved[: len(plan.blocks)], saved[len(plan.blocks) :]
        (T, N, H), K = dout_TNH.shape, k_TKH.shape[1]
        dout, key_TKH, value_TKH = _wide(dout_TNH), _wide(k_TKH) * plan.softmax_scale, _wide(v_TKH)
        masks = _masks(N // K, dout)
        dq_TNH = dout_TNH.new_empty(T, N, H, dtype=ctx.dtype)
        dkey_TKH, dvalue_TKH = dout.new_zeros(T, K, H), dout.new_zeros(T, K, H)
        for number, block in enumerate(plan.blocks):
            lo, hi = block[:2]
            q_KRH, key_LKH = queries[number], _keys(key_TKH, block)
            if number < len(kept):
                p_KRL = kept[number]
            else:
                p_KRL = _scores(q_KRH, key_LKH, masks, hi - lo, plan.window).softmax(dim=-1)
            dout_KRH = _fold(dout[lo:hi], K)
            dp_KRL = torch.bmm(dout_KRH, _keys(value_TKH, block).permute(1, 2, 0))
            dscore_KRL = torch.ops.aten._softmax_backward_data(dp_KRL, p_KRL, -1, dp_KRL.dtype)
            _unfold_into(dq_TNH[lo:hi], torch.bmm(dscore_KRL, key_LKH.transpose(0, 1)))
            _add_to_keys(dkey_TKH, block, torch.bmm(dscore_KRL.transpose(1, 2), q_KRH))
            _add_to_keys(dvalue_TKH, block, torch.bmm(p_KRL.transpose(1, 2), dout_KRH))
        dkey_TKH.mul_(plan.softmax_scale)
        return (dq_TNH, dkey_TKH.to(k_TKH.dtype), dvalue_TKH.to(v_TKH.dtype), *[None] * 3)


def _blocks(host_segments: HostSegments, window: int) -> list[Block]:
    """Each segment's rows in near-equal blocks of at most BLOCK_ROWS, in pack order, with the keys
    that the first of a block's rows sees, and those between it and the last."""
    blocks = []
    for start, end, prefix_start, prefix_end in host_segments:
        length = end - start
        parts = -(-length // BLOCK_ROWS)
        cuts = [start + length * part // parts for part in range(parts + 1)] if parts else []
        for lo, hi in pairwise(cuts):
            own, prefix = start, prefix_start
            if window:  # the prefix ends at the position where the segment starts
                first = lo - window + 1
                own = max(start, first)
                prefix = min(prefix_end, max(prefix_start, first - start + prefix_end))
            blocks.append((lo, hi, own, prefix, prefix_end))
    return blocks


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masks(group: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to a block's last columns, its own rows' keys: -inf above the diagonal. And to
    its first ones, keys that the first rows see and the window has left behind for the last."""
    full = like.new_full((BLOCK_ROWS, BLOCK_ROWS), -torch.inf)
    return full.triu(1).repeat_interleave(group, 0), full.tril().repeat_interleave(group, 0)


def _keys(x_TKH: torch.Tensor, block: Block) -> torch.Tensor:
    """The keys or values (L, K, H) a block sees: its prefix, then its segment up to its end."""
    _, hi, own_start, prefix_start, prefix_end = block
    own = x_TKH[own_start:hi]
    return torch.cat((x_TKH[prefix_start:prefix_end], own)) if prefix_end > prefix_start else own


def _add_to_keys(dx_TKH: torch.Tensor, block: Block, dx_KLH: torch.Tensor) -> None:
    """The transpose of `_keys`."""
    _, hi, own_start, prefix_start, prefix_end = block
    dx_LKH, prefix = dx_KLH.transpose(0, 1), prefix_end - prefix_start
    if prefix > 0:
        dx_TKH[prefix_start:prefix_end].add_(dx_LKH[:prefix])
    dx_TKH[own_start:hi].add_(dx_LKH[prefix:])


def _fold(x_nNH: torch.Tensor, K: int) -> torch.Tensor:
    """Query heads to rows: (n, N, H) -> (K, n * g, H); row i * g + j is row i of the group's j."""
    n, N, H = x_nNH.shape
    return x_nNH.view(n, K, N // K, H).transpose(0, 1).reshape(K, n * (N // K), H)


def _unfold_into(out_nNH: torch.Tensor, x_KRH: torch.Tensor) -> None:
    """The inverse of `_fold`, written to `out_nNH`."""
    (n, N, H), K = out_nNH.shape, x_KRH.shape[0]
    out_nNH.view(n, K, N // K, H).copy_(x_KRH.view(K, n, N // K, H).transpose(0, 1))


def _scores(
    q_KRH: torch.Tensor,
    key_LKH: torch.Tensor,
    masks: tuple[torch.Tensor, torch.Tensor],
    rows: int,
    window: int,
) -> torch.Tensor:
    causal_RR, passed_RR = masks
    score_KRL = torch.bmm(q_KRH, key_LKH.permute(1, 2, 0))
    # add_, not +=: on a slice += also copies the sum onto itself
    score_KRL[:, :, -rows:].add_(causal_RR[: q_KRH.shape[1], :rows])
    passed = key_LKH.shape[0] - window  # keys that the last row does not see any more
    if window and passed > 0:  # their positions have no gap: a prefix ends where the segment starts
        score_KRL[:, :, :passed].add_(passed_RR[-q_KRH.shape[1] :, -passed:])
    return score_KRL
