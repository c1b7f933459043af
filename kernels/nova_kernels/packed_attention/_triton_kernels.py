"""The device code of packed_attention in Triton: forward, dQ, and dK with dV.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, G = N / K. A row of a query
tile is (token, head): PACK heads that share a key head stand side by side, so their keys are loaded
once. Programs i_, offsets o_, masks m_, pointers p_, blocks b_.

Tiles of a range are aligned to its END (tile i of a range that ends at e starts at e - BLOCK * (i + 1)):
nothing behind a segment is ever read, and only the leftmost tile hangs over, on the left, where the
neighbours are earlier tokens or, below token 0, the descriptor's zeros. So of all tiles only the
diagonal ones and the overhanging one need a mask; each has a loop of its own.

Every output element has one writer that adds in a fixed order: no atomics, the same bits every run.
"""

import triton
import triton.language as tl


@triton.jit
def _load_keys(desc, i_token, kv_head, ROWS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """(ROWS, BLOCK_H) of one key head. From a flat (T, K * H) descriptor, so that the block can be a
    left operand out of shared memory (a reshaped one goes through registers); a head dim that is no
    power of two needs (T, K, H), whose zeros fill the block."""
    if H == BLOCK_H:
        return desc.load([i_token, kv_head * H])
    else:
        return desc.load([i_token, kv_head, 0]).reshape(ROWS, BLOCK_H)


@triton.jit
def _load_queries(
    desc,
    i_token,
    head,
    ROWS: tl.constexpr,
    PACK: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(ROWS, BLOCK_H): ROWS / PACK tokens with PACK heads each."""
    if PACK == 1 and H == BLOCK_H:
        return desc.load([i_token, head * H])
    else:
        return desc.load([i_token, head, 0]).reshape(ROWS, BLOCK_H)


@triton.jit
def _query_tile(p_tiles, i_tile):
    """Query rows [q0, q1) of one segment, where that segment starts, and the prefix it sees."""
    t = p_tiles + i_tile * 5
    return tl.load(t), tl.load(t + 1), tl.load(t + 2), tl.load(t + 3), tl.load(t + 4)


@triton.jit
def _first_seen(q0, own, prefix0, prefix1, WINDOW: tl.constexpr):
    """The first own key and the first key of the prefix that the tile's first row sees; its other rows see less of them."""
    if WINDOW == 0:
        return own, prefix0
    else:
        first = q0 - WINDOW + 1  # the prefix ends at the position where the segment starts
        in_prefix = tl.minimum(prefix1, tl.maximum(prefix0, first - own + prefix1))
        return tl.maximum(own, first), in_prefix


@triton.jit
def _key_loop(stage: tl.constexpr, q0, q1, own, prefix0, prefix1, BLOCK_N: tl.constexpr):
    """First and last + 1 step of a loop over key tiles, by kind: 0 diagonal, 1 whole own tiles,
    2 whole prefix tiles, 3 the at most two that hang over (step 0: own, step 1: prefix)."""
    num_own = tl.cdiv(q1 - own, BLOCK_N)
    whole_own, whole_prefix = (q1 - own) // BLOCK_N, (prefix1 - prefix0) // BLOCK_N
    num_diagonal = tl.minimum(tl.cdiv(q1 - q0, BLOCK_N), num_own)
    if stage == 0:
        return 0, num_diagonal
    elif stage == 1:
        return num_diagonal, whole_own
    elif stage == 2:
        return 0, whole_prefix
    else:
        own_hangs = (num_own > whole_own) & (num_own > num_diagonal)
        prefix_hangs = whole_prefix * BLOCK_N < prefix1 - prefix0
        return 1 - tl.where(own_hangs, 1, 0), 1 + tl.where(prefix_hangs, 1, 0)


@triton.jit
def _first_key(stage: tl.constexpr, i, q1, own, prefix0, prefix1, BLOCK_N: tl.constexpr):
    if stage < 2:
        return q1 - BLOCK_N * (i + 1)
    elif stage == 2:
        return prefix1 - BLOCK_N * (i + 1)
    else:
        last_own = q1 - BLOCK_N * tl.cdiv(q1 - own, BLOCK_N)
        last_prefix = prefix1 - BLOCK_N * tl.cdiv(prefix1 - prefix0, BLOCK_N)
        return tl.where(i == 0, last_own, last_prefix)


@triton.jit
def _allowed(stage: tl.constexpr, i, o_token, o_key, own, prefix0):
    """The mask of a tile in stage 0 or 3."""
    if stage == 0:
        return (o_key[None, :] <= o_token[:, None]) & (o_key[None, :] >= own)
    else:
        return (o_key >= tl.where(i == 0, own, prefix0))[None, :]


@triton.jit
def _within(stage: tl.constexpr, i, o_token, o_key, behind_prefix, WINDOW: tl.constexpr):
    """Whether keys lie in the rows' window: every tile may hold its edge. behind_prefix: tokens between the prefix's end and the segment."""
    if stage == 2:
        o_near = o_key + behind_prefix
    elif stage == 3:
        o_near = o_key + tl.where(i == 0, 0, behind_prefix)
    else:
        o_near = o_key
    return o_near[None, :] > o_token[:, None] - WINDOW


@triton.jit
def fwd_kernel(
    q_desc, k_desc, v_desc, p_out, p_lse, p_tiles, num_heads, scale,
    GROUP: tl.constexpr, PACK: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """out and its log-sum-exp, base 2, of the scaled scores; scale holds log2(e)."""
    i_item, groups = tl.program_id(0), num_heads // PACK
    q0, q1, own, prefix0, prefix1 = _query_tile(p_tiles, i_item // groups)
    behind_prefix = own - prefix1
    own, prefix0 = _first_seen(q0, own, prefix0, prefix1, WINDOW)
    head = (i_item % groups) * PACK
    kv_head = head // GROUP
    o_row, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_token, o_head = q0 + o_row // PACK, head + o_row % PACK
    b_q = _load_queries(q_desc, q0, head, BLOCK_M, PACK, H, BLOCK_H)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for stage in tl.static_range(4):  # the diagonal first: it gives every row a finite maximum
        lo, hi = _key_loop(stage, q0, q1, own, prefix0, prefix1, BLOCK_N)
        for i in range(lo, hi):
            j = _first_key(stage, i, q1, own, prefix0, prefix1, BLOCK_N)
            b_s = tl.dot(b_q, _load_keys(k_desc, j, kv_head, BLOCK_N, H, BLOCK_H).T)
            if stage == 0 or stage == 3:
                m = _allowed(stage, i, o_token, j + o_n, own, prefix0)
                b_s = tl.where(m, b_s, float("-inf"))
            if WINDOW > 0:
                m = _within(stage, i, o_token, j + o_n, behind_prefix, WINDOW)
                b_s = tl.where(m, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            # A row may have seen no key yet: its first token lies left of this diagonal tile.
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.exp2(b_s * scale - b_base[:, None])
            b_old = tl.exp2(b_max - b_base)
            b_sum = b_sum * b_old + tl.sum(b_p, 1)
            b_v = _load_keys(v_desc, j, kv_head, BLOCK_N, H, BLOCK_H)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_old[:, None])
            b_max = b_new
    m_row = o_token < q1
    tl.store(p_lse + o_token * num_heads + o_head, b_max + tl.log2(b_sum), mask=m_row)
    o_h = tl.arange(0, BLOCK_H)
    p_o = p_out + (o_token.to(tl.int64) * num_heads + o_head)[:, None] * H + o_h[None, :]
    b_out = (b_out / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_o, b_out, mask=m_row[:, None] & (o_h < H)[None, :])


@triton.jit
def dq_kernel(
    q_desc, k_desc, v_desc, out_desc, dout_desc, p_dq, p_lse, p_delta, p_tiles, num_heads, scale,
    softmax_scale, GROUP: tl.constexpr, PACK: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dq, and on the way delta = rowsum(out * dout), which dkv_kernel reads."""
    i_item, groups = tl.program_id(0), num_heads // PACK
    q0, q1, own, prefix0, prefix1 = _query_tile(p_tiles, i_item // groups)
    behind_prefix = own - prefix1
    own, prefix0 = _first_seen(q0, own, prefix0, prefix1, WINDOW)
    head = (i_item % groups) * PACK
    kv_head = head // GROUP
    o_row, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    o_token, o_head = q0 + o_row // PACK, head + o_row % PACK
    m_row, o_scalar = o_token < q1, o_token * num_heads + o_head
    b_out = _load_queries(out_desc, q0, head, BLOCK_M, PACK, H, BLOCK_H).to(tl.float32)
    b_dout = _load_queries(dout_desc, q0, head, BLOCK_M, PACK, H, BLOCK_H)
    b_delta = tl.sum(b_out * b_dout.to(tl.float32), 1)
    tl.store(p_delta + o_scalar, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + o_scalar, mask=m_row, other=float("inf"))  # rows behind the tile: p = 0
    b_q = _load_queries(q_desc, q0, head, BLOCK_M, PACK, H, BLOCK_H)
    b_dq = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for stage in tl.static_range(4):
        lo, hi = _key_loop(stage, q0, q1, own, prefix0, prefix1, BLOCK_N)
        for i in range(lo, hi):
            j = _first_key(stage, i, q1, own, prefix0, prefix1, BLOCK_N)
            b_k = _load_keys(k_desc, j, kv_head, BLOCK_N, H, BLOCK_H)
            b_v = _load_keys(v_desc, j, kv_head, BLOCK_N, H, BLOCK_H)
            b_s = tl.dot(b_q, b_k.T)
            b_dp = tl.dot(b_dout, b_v.T)
            b_p = tl.exp2(b_s * scale - b_lse[:, None])
            if stage == 0 or stage == 3:  # after the exponential, which may overflow where masked
                b_p = tl.where(_allowed(stage, i, o_token, j + o_n, own, prefix0), b_p, 0.0)
            if WINDOW > 0:
                b_p = tl.where(_within(stage, i, o_token, j + o_n, behind_prefix, WINDOW), b_p, 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)
    o_h = tl.arange(0, BLOCK_H)
    p_o = p_dq + (o_token.to(tl.int64) * num_heads + o_head)[:, None] * H + o_h[None, :]
    b_dq = (b_dq * softmax_scale).to(p_dq.dtype.element_ty)
    tl.store(p_o, b_dq, mask=m_row[:, None] & (o_h < H)[None, :])


@triton.jit
def _load_rows(p_x, o, m, other: tl.constexpr):
    if m is None:
        return tl.load(p_x + o)
    else:
        return tl.load(p_x + o, mask=m, other=other)


@triton.jit
def dkv_kernel(
    q_desc, k_desc, v_desc, dout_desc, p_dk, p_dv, p_lse, p_delta, p_position, p_tiles, num_heads, scale,
    softmax_scale, GROUP: tl.constexpr, PACK: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys: queries behind them in their own segment, then, for keys of a prefix,
    all of its branches, which lie side by side. Scores are computed transposed, so that P^T and dS^T
    come out as the operands of the next products."""
    num_kv_heads = num_heads // GROUP
    i_item = tl.program_id(0)
    t = p_tiles + (i_item // num_kv_heads) * 5
    k0, k1, own1, branch0, branch1 = (
        tl.load(t),
        tl.load(t + 1),
        tl.load(t + 2),
        tl.load(t + 3),
        tl.load(t + 4),
    )
    kv_head = i_item % num_kv_heads
    QUERIES: tl.constexpr = BLOCK_M // PACK
    o_row, o_key = tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    b_k = _load_keys(k_desc, k0, kv_head, BLOCK_N, H, BLOCK_H)
    b_v = _load_keys(v_desc, k0, kv_head, BLOCK_N, H, BLOCK_H)
    b_dk = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if WINDOW > 0:
        own1 = tl.minimum(own1, k1 - 1 + WINDOW)
        m_key = o_key < k1
        o_key_position = tl.load(p_position + o_key, mask=m_key, other=0).to(tl.int32)
        if branch1 > branch0:  # the first token of a branch is the nearest to the prefix
            nearest = tl.load(p_position + branch0) - tl.load(p_position + k1 - 1)
            branch1 = tl.where(nearest < WINDOW, branch1, branch0)
    whole_own = (own1 - (k1 - 1)) // QUERIES  # tiles whose first query sees every key
    whole_branch = (branch1 - branch0) // QUERIES
    for g in range(GROUP // PACK):
        head = kv_head * GROUP + g * PACK
        o_head = head + o_row % PACK
        for stage in tl.static_range(
            4
        ):  # whole own | masked own | whole branch | overhanging branch
            if stage == 0:
                lo, hi = 0, whole_own
            elif stage == 1:
                lo, hi = whole_own, tl.cdiv(own1 - k0, QUERIES)
            elif stage == 2:
                lo, hi = 0, whole_branch
            else:
                lo, hi = whole_branch, tl.cdiv(branch1 - branch0, QUERIES)
            for i in range(lo, hi):
                if stage < 2:  # noqa: SIM108 device code
                    j = own1 - QUERIES * (i + 1)
                else:
                    j = branch1 - QUERIES * (i + 1)
                o_token = j + o_row // PACK
                o_scalar = o_token * num_heads + o_head
                if stage == 1:
                    m_row = o_token >= k0
                elif stage == 3:
                    m_row = o_token >= branch0
                else:
                    m_row = None
                b_q = _load_queries(q_desc, j, head, BLOCK_M, PACK, H, BLOCK_H)
                b_lse = _load_rows(p_lse, o_scalar, m_row, float("inf"))
                b_p = tl.exp2(tl.dot(b_k, b_q.T) * scale - b_lse[None, :])
                if stage == 1:
                    b_p = tl.where(o_key[:, None] <= o_token[None, :], b_p, 0.0)
                if WINDOW > 0:
                    o_position = _load_rows(p_position, o_token, m_row, 0).to(tl.int32)
                    m_near = o_position[None, :] - o_key_position[:, None] < WINDOW
                    b_p = tl.where(m_near, b_p, 0.0)
                b_dout = _load_queries(dout_desc, j, head, BLOCK_M, PACK, H, BLOCK_H)
                b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv)
                b_delta = _load_rows(p_delta, o_scalar, m_row, 0.0)
                b_ds = b_p * (tl.dot(b_v, b_dout.T) - b_delta[None, :])
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    o_h = tl.arange(0, BLOCK_H)
    o = (o_key.to(tl.int64) * num_kv_heads + kv_head)[:, None] * H + o_h[None, :]
    m = (o_key < k1)[:, None] & (o_h < H)[None, :]
    tl.store(p_dk + o, (b_dk * softmax_scale).to(p_dk.dtype.element_ty), mask=m)
    tl.store(p_dv + o, b_dv.to(p_dv.dtype.element_ty), mask=m)
