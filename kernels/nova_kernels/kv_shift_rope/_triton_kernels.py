"""The device code of kv_shift_rope in Triton.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, F rotary_dim / 2, B blocks of
tokens. X stands for N or K. A block is (BLOCK_T tokens, some dims of one head), in fp32 from load to store.
A head row is three blocks: _1 and _2, the members of the turned pairs, and _r, the dims that pass; those that F leaves empty are 0.0.

The op is bound by memory, so the bytes are the design:
- A program owns BLOCK_T tokens and up to eight heads of one of Q, K, V: the cos and sin rows, fp32
  and so twice a head's bytes, are loaded once for all of them.
- The previous row is a second load of what the program or its neighbour reads anyway (L1, L2): HBM
  sees each row once.
- Backward, all successors u of a token t stand at position[t] + 1. A rotation is linear, so their
  gradients are added up first and turned back together; and sum_t <dk'[t], k[prev(t)]>, the
  gradient of the previous token's weight, is sum_t <sum of dk' over t's successors, k[t]>: no
  previous row is read at all.
- A norm's root mean square is summed in registers over the row that is loaded anyway, forward and
  backward: nothing is stored for it. Mixed keys load the previous row anyway, and sum that one too.
- The mix gradients leave a program as one fp32 partial per head, a norm weight's as one row for all
  its heads; a second, fixed sum over the blocks follows. BLOCK_T depends on the head dim only, so
  the result is the same on every GPU.
"""

import triton
import triton.language as tl


@triton.jit
def _load(p_x, o_row, o_dim, m):
    return tl.load(p_x + o_row[:, None] + o_dim[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p_x, o_row, o_dim, b_x, m):
    b_y = b_x.to(p_x.dtype.element_ty)
    tl.store(p_x + o_row[:, None] + o_dim[None, :], b_y, mask=m)


@triton.jit
def _load_pairs(
    p_x, o_row, m_row, F: tl.constexpr, BLOCK_F: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Both members of each rotated pair, (BLOCK_T, BLOCK_F) each."""
    if INTERLEAVED:  # one load, then split: loads of every other element would be 2 bytes wide
        o_dim = tl.arange(0, 2 * BLOCK_F)
        b_x = _load(p_x, o_row, o_dim, m_row[:, None] & (o_dim < 2 * F)[None, :])
        return tl.split(tl.reshape(b_x, (b_x.shape[0], BLOCK_F, 2)))
    else:
        o_f = tl.arange(0, BLOCK_F)
        m = m_row[:, None] & (o_f < F)[None, :]
        return _load(p_x, o_row, o_f, m), _load(p_x, o_row, o_f + F, m)


@triton.jit
def _store_pairs(
    p_x, o_row, m_row, b_1, b_2, F: tl.constexpr, BLOCK_F: tl.constexpr, INTERLEAVED: tl.constexpr
):
    if INTERLEAVED:
        o_dim = tl.arange(0, 2 * BLOCK_F)
        b_x = tl.reshape(tl.join(b_1, b_2), (b_1.shape[0], 2 * BLOCK_F))
        _store(p_x, o_row, o_dim, b_x, m_row[:, None] & (o_dim < 2 * F)[None, :])
    else:
        o_f = tl.arange(0, BLOCK_F)
        m = m_row[:, None] & (o_f < F)[None, :]
        _store(p_x, o_row, o_f, b_1, m)
        _store(p_x, o_row, o_f + F, b_2, m)


@triton.jit
def _weights(p_mix, i_head, MIXED: tl.constexpr):
    """Of the previous and of the current token."""
    if MIXED:
        p = p_mix + 2 * i_head
        return tl.load(p).to(tl.float32), tl.load(p + 1).to(tl.float32)
    else:
        return 0.0, 1.0


@triton.jit
def _table_rows(p_cos, p_sin, o_position, m, F: tl.constexpr, BLOCK_F: tl.constexpr):
    o_f = tl.arange(0, BLOCK_F)
    o = o_position[:, None] * F + o_f[None, :]
    m = m[:, None] & (o_f < F)[None, :]
    return tl.load(p_cos + o, mask=m, other=0.0), tl.load(p_sin + o, mask=m, other=0.0)


@triton.jit
def _load_row(
    p_x, o_row, m_row, H: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    b_1, b_2, b_r = 0.0, 0.0, 0.0
    if F > 0:
        b_1, b_2 = _load_pairs(p_x, o_row, m_row, F, BLOCK_F, INTERLEAVED)
    if 2 * F < H:
        o_d = 2 * F + tl.arange(0, BLOCK_REST)
        b_r = _load(p_x, o_row, o_d, m_row[:, None] & (o_d < H)[None, :])
    return b_1, b_2, b_r


@triton.jit
def _store_row(
    p_x, o_row, m_row, b_1, b_2, b_r, H: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    if F > 0:
        _store_pairs(p_x, o_row, m_row, b_1, b_2, F, BLOCK_F, INTERLEAVED)
    if 2 * F < H:
        o_d = 2 * F + tl.arange(0, BLOCK_REST)
        _store(p_x, o_row, o_d, b_r, m_row[:, None] & (o_d < H)[None, :])


@triton.jit
def _dot_rows(a_1, a_2, a_r, b_1, b_2, b_r, H: tl.constexpr, F: tl.constexpr):
    """Of each token: (BLOCK_T,)."""
    b_sum = 0.0
    if F > 0:
        b_sum += tl.sum(a_1 * b_1 + a_2 * b_2, axis=1)
    if 2 * F < H:
        b_sum += tl.sum(a_r * b_r, axis=1)
    return b_sum


@triton.jit
def _norm_weights(
    p_norm, H: tl.constexpr, F: tl.constexpr, NORMED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """As one row, (1, dims)."""
    w_1, w_2, w_r = 0.0, 0.0, 0.0
    if NORMED:
        if F > 0:
            o_f = tl.arange(0, BLOCK_F)
            o_1, o_2 = _pair_dims(o_f, F, INTERLEAVED)
            w_1 = tl.load(p_norm + o_1, mask=o_f < F, other=0.0).to(tl.float32)[None, :]
            w_2 = tl.load(p_norm + o_2, mask=o_f < F, other=0.0).to(tl.float32)[None, :]
        if 2 * F < H:
            o_d = 2 * F + tl.arange(0, BLOCK_REST)
            w_r = tl.load(p_norm + o_d, mask=o_d < H, other=0.0).to(tl.float32)[None, :]
    return w_1, w_2, w_r


@triton.jit
def _pair_dims(o_f, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        return 2 * o_f, 2 * o_f + 1
    else:
        return o_f, o_f + F


@triton.jit
def _unit_row(b_1, b_2, b_r, eps, H: tl.constexpr, F: tl.constexpr):
    """The row over its root mean square, and the inverse of that (BLOCK_T, 1). A row of zeros stays one."""
    b_inverse = tl.rsqrt(_dot_rows(b_1, b_2, b_r, b_1, b_2, b_r, H, F) / H + eps)[:, None]
    return b_1 * b_inverse, b_2 * b_inverse, b_r * b_inverse, b_inverse


@triton.jit
def _fwd_heads(
    p_x, p_out, p_mix, p_norm, eps, stride_t, stride_x, out_stride_t, out_stride_x, i_head,
    o_t, m_t, o_prev, m_prev, b_cos, b_sin,
    H: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, MIXED: tl.constexpr, NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads from i_head on: the first 2 F dims are turned, the rest only normalised and mixed."""
    w_1, w_2, w_r = _norm_weights(p_norm, H, F, NORMED, INTERLEAVED, BLOCK_F, BLOCK_REST)
    for i in tl.static_range(HEADS):
        h = i_head + i
        previous, current = _weights(p_mix, h, MIXED)
        o_x, o_p = o_t * stride_t + h * stride_x, o_prev * stride_t + h * stride_x
        b_1, b_2, b_r = _load_row(p_x, o_x, m_t, H, F, INTERLEAVED, BLOCK_F, BLOCK_REST)
        if NORMED:
            b_1, b_2, b_r, _ = _unit_row(b_1, b_2, b_r, eps, H, F)
        if MIXED:
            b_p1, b_p2, b_pr = _load_row(p_x, o_p, m_prev, H, F, INTERLEAVED, BLOCK_F, BLOCK_REST)
            if NORMED:
                b_p1, b_p2, b_pr, _ = _unit_row(b_p1, b_p2, b_pr, eps, H, F)
            b_1 = b_1 * current + b_p1 * previous
            b_2 = b_2 * current + b_p2 * previous
            b_r = b_r * current + b_pr * previous
        if NORMED:  # one weight for both rows: the mix is linear
            b_1, b_2, b_r = b_1 * w_1, b_2 * w_2, b_r * w_r
        if F > 0:
            b_1, b_2 = b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin
        o_y = o_t * out_stride_t + h * out_stride_x
        _store_row(p_out, o_y, m_t, b_1, b_2, b_r, H, F, INTERLEAVED, BLOCK_F, BLOCK_REST)


@triton.jit
def fwd_kernel(
    p_q, p_k, p_v, p_q_out, p_k_out, p_v_out, p_k_mix, p_v_mix, p_q_norm, p_k_norm, p_cos, p_sin,
    p_position, p_previous, T, eps,
    q_stride_t, q_stride_n, k_stride_t, k_stride_k, v_stride_t, v_stride_k,
    q_out_stride_t, q_out_stride_n, q_groups, k_groups,
    K: tl.constexpr, H: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    MIX_K: tl.constexpr = p_k_mix is not None
    MIX_V: tl.constexpr = p_v_mix is not None
    NORM_Q: tl.constexpr = p_q_norm is not None
    NORM_K: tl.constexpr = p_k_norm is not None
    i_group = tl.program_id(1)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    o_prev = tl.load(p_previous + o_t, mask=m_t, other=-1).to(tl.int64)
    m_prev = o_prev >= 0
    if i_group < q_groups + k_groups:
        o_position = tl.load(p_position + o_t, mask=m_t, other=0).to(tl.int64)
        b_cos, b_sin = _table_rows(p_cos, p_sin, o_position, m_t, F, BLOCK_F)
        if i_group < q_groups:
            _fwd_heads(
                p_q, p_q_out, None, p_q_norm, eps, q_stride_t, q_stride_n,
                q_out_stride_t, q_out_stride_n, i_group * Q_HEADS,
                o_t, m_t, o_prev, m_prev, b_cos, b_sin,
                H, F, Q_HEADS, False, NORM_Q, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
        else:
            _fwd_heads(
                p_k, p_k_out, p_k_mix, p_k_norm, eps, k_stride_t, k_stride_k, K * H, H,
                (i_group - q_groups) * KV_HEADS, o_t, m_t, o_prev, m_prev, b_cos, b_sin,
                H, F, KV_HEADS, MIX_K, NORM_K, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
    elif MIX_V:
        _fwd_heads(
            p_v, p_v_out, p_v_mix, None, eps, v_stride_t, v_stride_k, K * H, H,
            (i_group - q_groups - k_groups) * KV_HEADS, o_t, m_t, o_prev, m_prev, None, None,
            H, 0, KV_HEADS, MIX_V, False, INTERLEAVED, BLOCK_F, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _successor_pairs(
    p_dy, stride_t, o_head, o_t, m_next, p_successor, o_first, num_more, most,
    F: tl.constexpr, BLOCK_F: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Upstream gradients of all tokens whose previous token is t, added: t + 1, then branches in pack order."""
    b_1, b_2 = _load_pairs(p_dy, (o_t + 1) * stride_t + o_head, m_next, F, BLOCK_F, INTERLEAVED)
    j = 0
    while j < most:  # not `range`: the interpreter cannot take its bound from a reduction
        m_j = j < num_more
        o_u = tl.load(p_successor + o_first + j, mask=m_j, other=0).to(tl.int64)
        b_j1, b_j2 = _load_pairs(p_dy, o_u * stride_t + o_head, m_j, F, BLOCK_F, INTERLEAVED)
        b_1 += b_j1
        b_2 += b_j2
        j += 1
    return b_1, b_2


@triton.jit
def _successor_rest(
    p_dy, stride_t, o_head, o_d, m_d, o_t, m_next, p_successor, o_first, num_more, most
):
    """The same for the dims that do not turn."""
    m = m_next[:, None] & m_d[None, :]
    b_sum = _load(p_dy, (o_t + 1) * stride_t + o_head, o_d, m)
    j = 0
    while j < most:
        m_j = j < num_more
        o_u = tl.load(p_successor + o_first + j, mask=m_j, other=0).to(tl.int64)
        b_sum += _load(p_dy, o_u * stride_t + o_head, o_d, m_j[:, None] & m_d[None, :])
        j += 1
    return b_sum


@triton.jit
def _bwd_heads(
    p_dy, p_dx, p_x, p_mix, p_norm, p_partial, p_norm_partial, eps,
    stride_t, stride_x, x_stride_t, x_stride_x, i_head,
    o_t, m_t, m_next, p_successor, o_first, num_more, most, b_cos, b_sin, b_cos_next, b_sin_next,
    X: tl.constexpr, H: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, MIXED: tl.constexpr,
    NORMED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    w_1, w_2, w_r = _norm_weights(p_norm, H, F, NORMED, INTERLEAVED, BLOCK_F, BLOCK_REST)
    dw_1, dw_2, dw_r = 0.0, 0.0, 0.0
    for i in tl.static_range(HEADS):
        h = i_head + i
        previous, current = _weights(p_mix, h, MIXED)
        o_head = h * stride_x
        o_y, o_x = o_t * stride_t + o_head, o_t * x_stride_t + h * x_stride_x
        b_1, b_2, b_r = _load_row(p_dy, o_y, m_t, H, F, INTERLEAVED, BLOCK_F, BLOCK_REST)
        if F > 0:
            b_1, b_2 = b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin
        if MIXED or NORMED:
            b_x1, b_x2, b_xr = _load_row(p_x, o_x, m_t, H, F, INTERLEAVED, BLOCK_F, BLOCK_REST)
        if NORMED:
            b_x1, b_x2, b_xr, b_inverse = _unit_row(b_x1, b_x2, b_xr, eps, H, F)
        if MIXED:
            b_n1, b_n2, b_nr = 0.0, 0.0, 0.0
            if F > 0:
                b_s1, b_s2 = _successor_pairs(
                    p_dy, stride_t, o_head, o_t, m_next, p_successor, o_first, num_more, most,
                    F, BLOCK_F, INTERLEAVED,
                )  # fmt: skip
                b_n1 = b_s1 * b_cos_next + b_s2 * b_sin_next
                b_n2 = b_s2 * b_cos_next - b_s1 * b_sin_next
            if 2 * F < H:
                o_d = 2 * F + tl.arange(0, BLOCK_REST)
                b_nr = _successor_rest(
                    p_dy, stride_t, o_head, o_d, o_d < H, o_t, m_next, p_successor, o_first,
                    num_more, most,
                )  # fmt: skip
            if NORMED:  # what was mixed is the unit row times the weight
                b_m1, b_m2, b_mr = b_x1 * w_1, b_x2 * w_2, b_xr * w_r
            else:
                b_m1, b_m2, b_mr = b_x1, b_x2, b_xr
            dprevious = tl.sum(_dot_rows(b_n1, b_n2, b_nr, b_m1, b_m2, b_mr, H, F))
            dcurrent = tl.sum(_dot_rows(b_1, b_2, b_r, b_m1, b_m2, b_mr, H, F))
            tl.store(p_partial + 2 * h, dprevious)
            tl.store(p_partial + 2 * h + 1, dcurrent)
            b_1 = b_1 * current + b_n1 * previous
            b_2 = b_2 * current + b_n2 * previous
            b_r = b_r * current + b_nr * previous
        if NORMED:
            if F > 0:
                dw_1 += tl.sum(b_1 * b_x1, axis=0)
                dw_2 += tl.sum(b_2 * b_x2, axis=0)
            if 2 * F < H:
                dw_r += tl.sum(b_r * b_xr, axis=0)
            b_1, b_2, b_r = b_1 * w_1, b_2 * w_2, b_r * w_r
            b_along = (_dot_rows(b_1, b_2, b_r, b_x1, b_x2, b_xr, H, F) / H)[:, None]
            b_1 = (b_1 - b_x1 * b_along) * b_inverse
            b_2 = (b_2 - b_x2 * b_along) * b_inverse
            b_r = (b_r - b_xr * b_along) * b_inverse
        o_dx = o_t * (X * H) + h * H
        _store_row(p_dx, o_dx, m_t, b_1, b_2, b_r, H, F, INTERLEAVED, BLOCK_F, BLOCK_REST)
    if NORMED:
        if F > 0:
            o_f = tl.arange(0, BLOCK_F)
            o_1, o_2 = _pair_dims(o_f, F, INTERLEAVED)
            tl.store(p_norm_partial + o_1, dw_1, mask=o_f < F)
            tl.store(p_norm_partial + o_2, dw_2, mask=o_f < F)
        if 2 * F < H:
            o_d = 2 * F + tl.arange(0, BLOCK_REST)
            tl.store(p_norm_partial + o_d, dw_r, mask=o_d < H)


@triton.jit
def bwd_kernel(
    p_dq_out, p_dk_out, p_dv_out, p_dq, p_dk, p_dv, p_q, p_k, p_v, p_k_mix, p_v_mix,
    p_q_norm, p_k_norm, p_cos, p_sin, p_partial, p_norm_partial,
    p_position, p_previous, p_offset, p_successor, T, P, eps,
    q_stride_t, q_stride_n, k_stride_t, k_stride_k, v_stride_t, v_stride_k,
    q_in_stride_t, q_in_stride_n, k_in_stride_t, k_in_stride_k, v_in_stride_t, v_in_stride_k,
    q_groups, k_groups,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    MIX_K: tl.constexpr = p_k_mix is not None
    MIX_V: tl.constexpr = p_v_mix is not None
    NORM_Q: tl.constexpr = p_q_norm is not None
    NORM_K: tl.constexpr = p_k_norm is not None
    i_block, i_group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_t = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    o_position = tl.load(p_position + o_t, mask=m_t, other=0).to(tl.int64)
    m_next = tl.load(p_previous + o_t + 1, mask=o_t + 1 < T, other=-1) == o_t
    o_first = tl.load(p_offset + o_t, mask=m_t, other=0)
    num_more = tl.load(p_offset + o_t + 1, mask=m_t, other=0) - o_first
    most = tl.max(num_more)
    p_partial += i_block * (4 * K)
    if i_group < q_groups + k_groups:
        if NORM_Q or NORM_K:  # one row for each program of Q and of K
            p_norm_partial += (i_block * (q_groups + k_groups) + i_group) * H
        b_cos, b_sin = _table_rows(p_cos, p_sin, o_position, m_t, F, BLOCK_F)
        if i_group < q_groups:
            _bwd_heads(
                p_dq_out, p_dq, p_q, None, p_q_norm, None, p_norm_partial, eps,
                q_stride_t, q_stride_n, q_in_stride_t, q_in_stride_n, i_group * Q_HEADS,
                o_t, m_t, m_next, p_successor, o_first, num_more, most, b_cos, b_sin, b_cos, b_sin,
                N, H, F, Q_HEADS, False, NORM_Q, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
        else:
            m_table = m_t & (o_position + 1 < P)  # beyond the table: a token without successors
            b_cos_next, b_sin_next = _table_rows(p_cos, p_sin, o_position + 1, m_table, F, BLOCK_F)
            _bwd_heads(
                p_dk_out, p_dk, p_k, p_k_mix, p_k_norm, p_partial, p_norm_partial, eps,
                k_stride_t, k_stride_k, k_in_stride_t, k_in_stride_k,
                (i_group - q_groups) * KV_HEADS,
                o_t, m_t, m_next, p_successor, o_first, num_more, most,
                b_cos, b_sin, b_cos_next, b_sin_next,
                K, H, F, KV_HEADS, MIX_K, NORM_K, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
    elif MIX_V:
        _bwd_heads(
            p_dv_out, p_dv, p_v, p_v_mix, None, p_partial + 2 * K, None, eps,
            v_stride_t, v_stride_k, v_in_stride_t, v_in_stride_k,
            (i_group - q_groups - k_groups) * KV_HEADS,
            o_t, m_t, m_next, p_successor, o_first, num_more, most, None, None, None, None,
            K, H, 0, KV_HEADS, MIX_V, False, INTERLEAVED, BLOCK_F, BLOCK_H,
        )  # fmt: skip
