"""linear_logprob in Triton: the passes over rows around the products. One writer per element.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank.
        Programs i_, offsets o_, masks m_, pointers p_, blocks b_.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("num_tokens",))
def sum_rows_kernel(
    p_dx,
    p_order,
    p_start,
    p_dhidden,
    num_tokens,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dhidden[t] = sum of dx[order[i]] for i in [start[t], start[t + 1]), in that order; else 0."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t = o_t < num_tokens
    m_d = (o_d < D)[None, :]
    b_start = tl.load(p_start + o_t, mask=m_t, other=0)
    b_count = tl.load(p_start + o_t + 1, mask=m_t, other=0) - b_start
    b_dhidden = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in range(0, tl.max(b_count, 0)):
        m_i = i < b_count
        b_r = tl.load(p_order + b_start + i, mask=m_i, other=0)
        p_row = p_dx + b_r[:, None] * D + o_d[None, :]
        b_dhidden += tl.load(p_row, mask=m_i[:, None] & m_d, other=0.0)
    p_out = p_dhidden + o_t.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_dhidden.to(p_dhidden.dtype.element_ty), mask=m_t[:, None] & m_d)


@triton.jit(do_not_specialize=("num_columns",))
def inverse_norm_kernel(
    p_weight,
    p_out,
    num_columns,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1 / max(|W_v|, EPS) of the first num_columns rows of the weight."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    m_v = o_v < num_columns
    p_w = p_weight + o_v.to(tl.int64)[:, None] * D + o_d[None, :]
    b_square = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        m = m_v[:, None] & (d + o_d < D)[None, :]
        b_w = tl.load(p_w + d, mask=m, other=0.0).to(tl.float32)
        b_square += b_w * b_w
    b_norm = tl.sqrt_rn(tl.sum(b_square, 1))
    tl.store(p_out + o_v, 1.0 / tl.maximum(b_norm, EPS), mask=m_v)


@triton.jit(do_not_specialize=("num_columns",))
def project_kernel(
    p_u,
    p_weight,
    p_inverse_norm,
    p_dweight,
    num_columns,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dW_v = u_v - w (w . u_v) with w = W_v / |W_v|: what its length cannot feel is taken out."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    m_v = o_v < num_columns
    o_vd = o_v.to(tl.int64)[:, None] * D + o_d[None, :]
    b_norm = tl.load(p_inverse_norm + o_v, mask=m_v, other=0.0)[:, None]
    b_along = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        m = m_v[:, None] & (d + o_d < D)[None, :]
        b_w = tl.load(p_weight + o_vd + d, mask=m, other=0.0).to(tl.float32) * b_norm
        b_along += b_w * tl.load(p_u + o_vd + d, mask=m, other=0.0)
    b_dot = tl.sum(b_along, 1)[:, None]
    for d in range(0, D, BLOCK_D):
        m = m_v[:, None] & (d + o_d < D)[None, :]
        b_w = tl.load(p_weight + o_vd + d, mask=m, other=0.0).to(tl.float32) * b_norm
        b_dw = tl.load(p_u + o_vd + d, mask=m, other=0.0) - b_w * b_dot
        tl.store(p_dweight + o_vd + d, b_dw.to(p_dweight.dtype.element_ty), mask=m)
