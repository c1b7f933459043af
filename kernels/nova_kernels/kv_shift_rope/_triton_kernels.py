"""The device code of kv_shift_rope in Triton.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, F rotary_dim / 2, B blocks of
tokens. X stands for N or K. A block is (BLOCK_T tokens, some dims of one head), in fp32 from load to store.

The op is bound by memory, so the bytes are the design:
- A program owns BLOCK_T tokens and up to eight heads of one of Q, K, V: the cos and sin rows, fp32
  and so twice a head's bytes, are loaded once for all of them.
- The previous row is a second load of what the program or its neighbour reads anyway (L1, L2): HBM
  sees each row once.
- Backward, all successors u of a token t stand at position[t] + 1. A rotation is linear, so their
  gradients are added up first and turned back together; and sum_t <dk'[t], k[prev(t)]>, the
  gradient of the previous token's weight, is sum_t <sum of dk' over t's successors, k[t]>: no
  previous row is read at all.
- The mix gradients leave a program as one fp32 partial per head; a second, fixed sum over the
  blocks follows. BLOCK_T depends on the head dim only, so the result is the same on every GPU.
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
def _fwd_heads(
    p_x, p_out, p_mix, stride_t, stride_x, i_head, o_t, m_t, o_prev, m_prev, b_cos, b_sin,
    X: tl.constexpr, H: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, MIXED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads from i_head on: the first 2 F dims are turned, the rest only mixed."""
    for i in tl.static_range(HEADS):
        h = i_head + i
        previous, current = _weights(p_mix, h, MIXED)
        o_x, o_p = o_t * stride_t + h * stride_x, o_prev * stride_t + h * stride_x
        o_y = o_t * (X * H) + h * H
        if F > 0:
            b_1, b_2 = _load_pairs(p_x, o_x, m_t, F, BLOCK_F, INTERLEAVED)
            if MIXED:
                b_p1, b_p2 = _load_pairs(p_x, o_p, m_prev, F, BLOCK_F, INTERLEAVED)
                b_1 = b_1 * current + b_p1 * previous
                b_2 = b_2 * current + b_p2 * previous
            b_y1, b_y2 = b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin
            _store_pairs(p_out, o_y, m_t, b_y1, b_y2, F, BLOCK_F, INTERLEAVED)
        if 2 * F < H:
            o_d = 2 * F + tl.arange(0, BLOCK_REST)
            m = m_t[:, None] & (o_d < H)[None, :]
            b_r = _load(p_x, o_x, o_d, m)
            if MIXED:
                m_p = m_prev[:, None] & (o_d < H)[None, :]
                b_r = b_r * current + _load(p_x, o_p, o_d, m_p) * previous
            _store(p_out, o_y, o_d, b_r, m)


@triton.jit
def fwd_kernel(
    p_q, p_k, p_v, p_q_out, p_k_out, p_v_out, p_k_mix, p_v_mix, p_cos, p_sin, p_position, p_previous,
    T, q_stride_t, q_stride_n, k_stride_t, k_stride_k, v_stride_t, v_stride_k, q_groups, k_groups,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    MIX_K: tl.constexpr = p_k_mix is not None
    MIX_V: tl.constexpr = p_v_mix is not None
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
                p_q, p_q_out, None, q_stride_t, q_stride_n, i_group * Q_HEADS,
                o_t, m_t, o_prev, m_prev, b_cos, b_sin,
                N, H, F, Q_HEADS, False, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
        else:
            _fwd_heads(
                p_k, p_k_out, p_k_mix, k_stride_t, k_stride_k, (i_group - q_groups) * KV_HEADS,
                o_t, m_t, o_prev, m_prev, b_cos, b_sin,
                K, H, F, KV_HEADS, MIX_K, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
    elif MIX_V:
        _fwd_heads(
            p_v, p_v_out, p_v_mix, v_stride_t, v_stride_k, (i_group - q_groups - k_groups) * KV_HEADS,
            o_t, m_t, o_prev, m_prev, None, None,
            K, H, 0, KV_HEADS, MIX_V, INTERLEAVED, BLOCK_F, BLOCK_H,
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
    p_dy, p_dx, p_x, p_mix, p_partial, stride_t, stride_x, x_stride_t, x_stride_x, i_head,
    o_t, m_t, m_next, p_successor, o_first, num_more, most, b_cos, b_sin, b_cos_next, b_sin_next,
    X: tl.constexpr, H: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, MIXED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(HEADS):
        h = i_head + i
        previous, current = _weights(p_mix, h, MIXED)
        o_head = h * stride_x
        o_y, o_dx, o_x = (
            o_t * stride_t + o_head,
            o_t * (X * H) + h * H,
            o_t * x_stride_t + h * x_stride_x,
        )
        dprevious, dcurrent = 0.0, 0.0
        if F > 0:
            b_1, b_2 = _load_pairs(p_dy, o_y, m_t, F, BLOCK_F, INTERLEAVED)
            b_d1, b_d2 = b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin
            if MIXED:
                b_s1, b_s2 = _successor_pairs(
                    p_dy, stride_t, o_head, o_t, m_next, p_successor, o_first, num_more, most,
                    F, BLOCK_F, INTERLEAVED,
                )  # fmt: skip
                b_n1 = b_s1 * b_cos_next + b_s2 * b_sin_next
                b_n2 = b_s2 * b_cos_next - b_s1 * b_sin_next
                b_x1, b_x2 = _load_pairs(p_x, o_x, m_t, F, BLOCK_F, INTERLEAVED)
                dcurrent += tl.sum(b_d1 * b_x1 + b_d2 * b_x2)
                dprevious += tl.sum(b_n1 * b_x1 + b_n2 * b_x2)
                b_d1 = b_d1 * current + b_n1 * previous
                b_d2 = b_d2 * current + b_n2 * previous
            _store_pairs(p_dx, o_dx, m_t, b_d1, b_d2, F, BLOCK_F, INTERLEAVED)
        if 2 * F < H:
            o_d = 2 * F + tl.arange(0, BLOCK_REST)
            m_d = o_d < H
            m = m_t[:, None] & m_d[None, :]
            b_d = _load(p_dy, o_y, o_d, m)
            if MIXED:
                b_n = _successor_rest(
                    p_dy,
                    stride_t,
                    o_head,
                    o_d,
                    m_d,
                    o_t,
                    m_next,
                    p_successor,
                    o_first,
                    num_more,
                    most,
                )
                b_x = _load(p_x, o_x, o_d, m)
                dcurrent += tl.sum(b_d * b_x)
                dprevious += tl.sum(b_n * b_x)
                b_d = b_d * current + b_n * previous
            _store(p_dx, o_dx, o_d, b_d, m)
        if MIXED:
            tl.store(p_partial + 2 * h, dprevious)
            tl.store(p_partial + 2 * h + 1, dcurrent)


@triton.jit
def bwd_kernel(
    p_dq_out, p_dk_out, p_dv_out, p_dq, p_dk, p_dv, p_k, p_v, p_k_mix, p_v_mix, p_cos, p_sin, p_partial,
    p_position, p_previous, p_offset, p_successor, T, P,
    q_stride_t, q_stride_n, k_stride_t, k_stride_k, v_stride_t, v_stride_k,
    k_in_stride_t, k_in_stride_k, v_in_stride_t, v_in_stride_k, q_groups, k_groups,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    MIX_K: tl.constexpr = p_k_mix is not None
    MIX_V: tl.constexpr = p_v_mix is not None
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
        b_cos, b_sin = _table_rows(p_cos, p_sin, o_position, m_t, F, BLOCK_F)
        if i_group < q_groups:
            _bwd_heads(
                p_dq_out, p_dq, None, None, None, q_stride_t, q_stride_n, 0, 0, i_group * Q_HEADS,
                o_t, m_t, m_next, p_successor, o_first, num_more, most, b_cos, b_sin, b_cos, b_sin,
                N, H, F, Q_HEADS, False, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
        else:
            m_table = m_t & (o_position + 1 < P)  # beyond the table: a token without successors
            b_cos_next, b_sin_next = _table_rows(p_cos, p_sin, o_position + 1, m_table, F, BLOCK_F)
            _bwd_heads(
                p_dk_out, p_dk, p_k, p_k_mix, p_partial, k_stride_t, k_stride_k,
                k_in_stride_t, k_in_stride_k, (i_group - q_groups) * KV_HEADS,
                o_t, m_t, m_next, p_successor, o_first, num_more, most,
                b_cos, b_sin, b_cos_next, b_sin_next,
                K, H, F, KV_HEADS, MIX_K, INTERLEAVED, BLOCK_F, BLOCK_REST,
            )  # fmt: skip
    elif MIX_V:
        _bwd_heads(
            p_dv_out, p_dv, p_v, p_v_mix, p_partial + 2 * K, v_stride_t, v_stride_k,
            v_in_stride_t, v_in_stride_k, (i_group - q_groups - k_groups) * KV_HEADS,
            o_t, m_t, m_next, p_successor, o_first, num_more, most, None, None, None, None,
            K, H, 0, KV_HEADS, MIX_V, INTERLEAVED, BLOCK_F, BLOCK_H,
        )  # fmt: skip
