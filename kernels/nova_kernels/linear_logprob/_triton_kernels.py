"""linear_logprob in Triton: what is fused into the product with the weight.

    fold_kernel             z = hidden[row] @ W^T tile by tile, folded into each row's softmax state;
                            2 R D V FLOPs, W read once per block of rows, no logits in memory
    dlogits_kernel          the same product again, turned into dz on the way out (plan "recompute")
    stored_dlogits_kernel   dz from the exponentials that fold_kernel kept (plan "store")

An optional pointer or descriptor that is None switches its part of a kernel off at compile time.
No kernel uses atomics, and no result depends on the number of programs: each output element has
one writer, which adds in a fixed order.

Legend: T packed tokens, R response rows, D hidden, V vocabulary columns of this rank,
        W columns of one wave. Programs i_, offsets o_, masks m_, pointers p_, blocks b_.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
IGNORE = tl.constexpr(-100)
# Numbers that vary from call to call: a kernel compiled once serves them all.
NEVER_SPECIALIZED = ("num_rows", "num_columns", "first_column", "wave_start", "wave_tiles")


@triton.jit
def _grouped(i, num_rows, num_columns, GROUP: tl.constexpr):
    """Item i of a (rows, columns) grid: down GROUP rows, then the next column, then the next group."""
    first = (i // (GROUP * num_columns)) * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    within = i - first * num_columns
    return first + within % size, within // size


@triton.jit
def _logits(
    p_hidden,
    w_desc,
    b_row,
    m_x,
    i_column,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Products (BLOCK_M, BLOCK_N) fp32 of gathered rows and the columns from i_column on, in two
    halves: an epilogue of 128 x 256 values at once would not fit into registers.

    Rows outside m_x count as zeros and are not read: a NaN in them stays there.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_x = p_hidden + b_row.to(tl.int64)[:, None] * D + o_k[None, :]
    b_z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        m_k = m_x[:, None] if D % BLOCK_K == 0 else m_x[:, None] & (k + o_k < D)[None, :]
        b_x = tl.load(p_x + k, mask=m_k, other=0.0)
        b_w = w_desc.load([i_column, k])
        if UPCAST:  # the interpreter multiplies bf16 as bit patterns
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_z = tl.dot(b_x, b_w.T, b_z, input_precision="ieee")
    return tl.split(tl.permute(tl.reshape(b_z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _above_underflow(b_log2):
    """No lower than where exp2 is 0 anyway, so that 0 * log 0 is 0 and not NaN; NaN stays NaN."""
    return tl.maximum(b_log2, -1000.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normalized(b_v, p_inverse_norm, o_v, num_columns):
    """Columns divided by the length of their weight row, under NormHead."""
    if p_inverse_norm is not None:
        b_v *= tl.load(p_inverse_norm + o_v, mask=o_v < num_columns, other=0.0)[None, :]
    return b_v


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def fold_kernel(
    p_hidden,
    w_desc,
    e_desc,
    p_row,
    p_target,
    p_inverse_norm,
    p_state,
    p_tile_max,
    num_rows,
    num_columns,
    first_column,
    inverse_temperature,
    D: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """State of each row over each of SPLITS ranges of the vocabulary: p_state (5, SPLITS, R).

    max, sum of exp(z - max), target's logit or -inf, sum of exp(z - max) (z - max), argmax. With
    e_desc also exp(z - m) per half tile, m the row's maximum so far, kept in p_tile_max.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    tiles = tl.cdiv(num_columns, BLOCK_N)
    for item in range(tl.program_id(0), row_tiles * SPLITS, tl.num_programs(0)):
        i_m, i_s = _grouped(item, row_tiles, SPLITS, GROUP)
        o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_r = o_r < num_rows
        b_row = tl.load(p_row + o_r, mask=m_r, other=0)
        b_target = tl.load(p_target + o_r, mask=m_r, other=IGNORE)
        m_x = b_target != IGNORE
        b_target = (b_target - first_column).to(tl.int32)
        b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        b_logit = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_moment = tl.zeros((BLOCK_M,), tl.float32)
        b_argmax = tl.zeros((BLOCK_M,), tl.int32)
        for i_v in range(tiles * i_s // SPLITS, tiles * (i_s + 1) // SPLITS):
            b_left, b_right = _logits(
                p_hidden,
                w_desc,
                b_row,
                m_x,
                i_v * BLOCK_N,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                UPCAST,
            )
            for half in tl.static_range(2):
                i_column = i_v * BLOCK_N + half * (BLOCK_N // 2)
                o_v = i_column + tl.arange(0, BLOCK_N // 2)
                b_z = (b_left if half == 0 else b_right) * inverse_temperature
                b_z = _normalized(b_z, p_inverse_norm, o_v, num_columns)
                if i_column + BLOCK_N // 2 > num_columns:
                    b_z = tl.where(o_v[None, :] < num_columns, b_z, float("-inf"))
                # One tile in four holds a target: the others skip a quarter of the epilogue.
                m_hit = (b_target >= i_column) & (b_target < i_column + BLOCK_N // 2)
                if tl.max(m_hit.to(tl.int32), 0) > 0:
                    b_hit = tl.where(o_v[None, :] == b_target[:, None], b_z, float("-inf"))
                    b_logit = tl.maximum(b_logit, tl.max(b_hit, 1))
                if ARGMAX:
                    b_top, b_index = tl.max(b_z, 1, return_indices=True)  # the first of several
                    b_argmax = tl.where(b_top > b_max, i_column + b_index, b_argmax)
                else:
                    b_top = tl.max(b_z, 1)
                b_new = tl.maximum(b_max, b_top)
                b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf would be NaN
                # (z - max) first, then the factor: exact for logits of 1e4 too.
                b_d = (b_z - b_shift[:, None]) * LOG2E
                if ENTROPY:
                    b_d = _above_underflow(b_d)
                b_e = tl.exp2(b_d)
                b_drop = (b_max - b_shift) * LOG2E
                b_decay = tl.exp2(b_drop)
                if ENTROPY:
                    b_moved = tl.where(b_sum == 0.0, 0.0, b_moment + b_drop * b_sum)
                    b_moment = b_moved * b_decay + tl.sum(b_e * b_d, 1)
                b_sum = b_sum * b_decay + tl.sum(b_e, 1)
                b_max = b_new
                if e_desc is not None:
                    e_desc.store([i_m * BLOCK_M, i_column], b_e.to(e_desc.dtype))
                    p_half = p_tile_max + (2 * i_v + half) * num_rows.to(tl.int64)
                    tl.store(p_half + o_r, b_new, mask=m_r)
        p_out = p_state + i_s * num_rows + o_r
        stride = SPLITS * num_rows
        tl.store(p_out, b_max, mask=m_r)
        tl.store(p_out + stride, b_sum, mask=m_r)
        tl.store(p_out + 2 * stride, b_logit, mask=m_r)
        if ENTROPY:
            tl.store(p_out + 3 * stride, b_moment * LN2, mask=m_r)
        if ARGMAX:
            tl.store(p_out + 4 * stride, (b_argmax + first_column).to(tl.float32), mask=m_r)


@triton.jit
def _dlogits(
    b_log2_p,
    o_v,
    b_target,
    p_rows,
    p_inverse_norm,
    o_r,
    m_r,
    num_rows,
    num_columns,
    ENTROPY: tl.constexpr,
    MAX: tl.constexpr,
):
    """d loss / d (x W^T): g (onehot_target - p) - h p (log p + entropy) + k onehot_argmax.

    p_rows (8, R) fp32: max, log2 sum, target's logit, g, h, entropy, k, argmax; g, h and k are
    upstream gradients / temperature, 0 in ignored rows.
    """
    b_g = tl.load(p_rows + 3 * num_rows + o_r, mask=m_r, other=0.0)
    if ENTROPY:
        b_log2_p = _above_underflow(b_log2_p)
        b_h = tl.load(p_rows + 4 * num_rows + o_r, mask=m_r, other=0.0)
        b_entropy = tl.load(p_rows + 5 * num_rows + o_r, mask=m_r, other=0.0)
        b_slope = (b_h * LN2)[:, None] * b_log2_p + (b_g + b_h * b_entropy)[:, None]
        b_dz = -tl.exp2(b_log2_p) * b_slope
    else:
        b_dz = -tl.exp2(b_log2_p) * b_g[:, None]
    b_dz += tl.where(o_v[None, :] == b_target[:, None], b_g[:, None], 0.0)
    if MAX:
        b_k = tl.load(p_rows + 6 * num_rows + o_r, mask=m_r, other=0.0)
        b_argmax = tl.load(p_rows + 7 * num_rows + o_r, mask=m_r, other=-1.0).to(tl.int32)
        b_dz += tl.where(o_v[None, :] == b_argmax[:, None], b_k[:, None], 0.0)
    return _normalized(b_dz, p_inverse_norm, o_v, num_columns)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def dlogits_kernel(
    p_hidden,
    w_desc,
    dz_desc,
    p_row,
    p_target,
    p_inverse_norm,
    p_rows,
    num_rows,
    num_columns,
    first_column,
    wave_start,
    wave_tiles,
    inverse_temperature,
    D: tl.constexpr,
    ENTROPY: tl.constexpr,
    MAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dz_desc (R, W) = dz of the columns from wave_start on, from logits that are recomputed."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    for item in range(tl.program_id(0), row_tiles * wave_tiles, tl.num_programs(0)):
        i_m, i_v = _grouped(item, row_tiles, wave_tiles, GROUP)
        o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_r = o_r < num_rows
        b_row = tl.load(p_row + o_r, mask=m_r, other=0)
        b_target = tl.load(p_target + o_r, mask=m_r, other=IGNORE)
        b_left, b_right = _logits(
            p_hidden,
            w_desc,
            b_row,
            b_target != IGNORE,
            wave_start + i_v * BLOCK_N,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            UPCAST,
        )
        b_max = tl.load(p_rows + o_r, mask=m_r, other=0.0)
        b_log2_sum = tl.load(p_rows + num_rows + o_r, mask=m_r, other=0.0)
        for half in tl.static_range(2):
            i_column = i_v * BLOCK_N + half * (BLOCK_N // 2)
            o_v = wave_start + i_column + tl.arange(0, BLOCK_N // 2)
            b_z = (b_left if half == 0 else b_right) * inverse_temperature
            b_z = _normalized(b_z, p_inverse_norm, o_v, num_columns)
            b_log2_p = (b_z - b_max[:, None]) * LOG2E - b_log2_sum[:, None]
            b_dz = _dlogits(
                b_log2_p,
                o_v,
                (b_target - first_column).to(tl.int32),
                p_rows,
                p_inverse_norm,
                o_r,
                m_r,
                num_rows,
                num_columns,
                ENTROPY,
                MAX,
            )
            dz_desc.store([i_m * BLOCK_M, i_column], b_dz.to(dz_desc.dtype))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def stored_dlogits_kernel(
    p_e,
    p_dz,
    p_tile_max,
    p_target,
    p_inverse_norm,
    p_rows,
    num_rows,
    num_columns,
    first_column,
    wave_start,
    stride_e,
    stride_dz,
    ENTROPY: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same from e = exp(z - tile_max), which fold_kernel kept for its tiles of BLOCK_N columns.

    The target's p comes from its fp32 logit, so that 1 - p keeps its digits whatever e's dtype.
    """
    o_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_w = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = tl.multiple_of(wave_start, BLOCK_N) + o_w
    m_r = o_r < num_rows
    # No mask of columns, for wide loads: both blocks consist of whole tiles.
    p_r = p_e + o_r.to(tl.int64)[:, None] * stride_e
    b_e = tl.load(p_r + o_v[None, :], mask=m_r[:, None], other=0.0).to(tl.float32)
    i_tile = (wave_start // BLOCK_N + tl.program_id(1)).to(tl.int64)
    b_tile_max = tl.load(p_tile_max + i_tile * num_rows + o_r, mask=m_r, other=0.0)
    b_target = (tl.load(p_target + o_r, mask=m_r, other=IGNORE) - first_column).to(tl.int32)
    b_max = tl.load(p_rows + o_r, mask=m_r, other=0.0)
    b_log2_sum = tl.load(p_rows + num_rows + o_r, mask=m_r, other=0.0)
    b_logit = tl.load(p_rows + 2 * num_rows + o_r, mask=m_r, other=0.0)
    b_shift = (b_tile_max - b_max) * LOG2E - b_log2_sum
    b_sure = (b_logit - b_max) * LOG2E - b_log2_sum
    m_target = o_v[None, :] == b_target[:, None]
    b_log2_p = tl.where(m_target, b_sure[:, None], tl.log2(b_e) + b_shift[:, None])
    b_dz = _dlogits(
        b_log2_p,
        o_v,
        b_target,
        p_rows,
        p_inverse_norm,
        o_r,
        m_r,
        num_rows,
        num_columns,
        ENTROPY,
        MAX,
    )
    p_out = p_dz + o_r.to(tl.int64)[:, None] * stride_dz + o_w[None, :]
    tl.store(p_out, b_dz.to(p_dz.dtype.element_ty), mask=m_r[:, None])
