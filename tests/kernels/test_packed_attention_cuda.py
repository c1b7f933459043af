"""packed_attention's CUDA kernels on a CPU: in the emulator, their index logic, their bindings."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from nova_kernels import _C, packed_attention
from nova_kernels.backend import cuda_kernels
from nova_kernels.kv_shift_rope import _cuda as kv_shift_rope_cuda
from nova_kernels.packed_attention import _cuda, schedule
from nova_kernels.packed_attention.reference import attention_mask, dense_attention
from nova_kernels.segments import segment_index
from nova_kernels.testing import poison, random_segments, segment_table
from tests.kernels.emulated_packed_attention import Call, EmulatedKernels
from tests.kernels.packed_attention_cases import (
    TABLES,
    assert_matches,
    exact,
    inputs,
    padding_of,
    run,
)


def emulate(
    kernels: EmulatedKernels,
    segments: torch.Tensor,
    args: Sequence[torch.Tensor],
    *,
    softmax_scale: float,
) -> list[torch.Tensor]:
    """[out, lse, dq, dk, dv] of the whole path from autograd down; buffers begin as NaN."""
    index = segment_index(segments, int(segments[-1, 1]))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return _cuda.packed_attention_cuda(q, k, v, index, softmax_scale=softmax_scale)

    with pytest.MonkeyPatch.context() as patch, poison():
        patch.setattr(_cuda, "cuda_kernels", lambda: kernels)
        return run(attention, args)


@pytest.mark.parametrize(
    ("table", "heads", "how"),
    [
        ("branches", (4, 4, 128), (3, 0, 1)),
        ("branches", (2, 1, 128), (2, 1, 1)),
        ("tile edges", (2, 2, 64), (2, 2, 3)),
        ("tile edges", (1, 1, 128), (1, 0, 1)),
        ("one segment", (1, 1, 64), (2, 1, 1)),
        ("one segment", (1, 1, 128), (3, 2, 2)),
        ("tiny", (4, 2, 64), (5, 0, 1)),
        ("tiny", (8, 1, 128), (2, 1, 2)),
        ("one token", (2, 1, 128), (1, 0, 2)),
        ("long prefix", (4, 1, 128), (2, 2, 16)),
        ("long prefix", (8, 1, 64), (2, 0, 1)),
        ("random 0", (3, 1, 64), (4, 1, 5)),
        ("random 1", (6, 1, 128), (2, 2, 1)),
        ("random 1", (16, 1, 64), (1, 0, 2)),
    ],
)
def test_matches_fp64(table: str, heads: tuple[int, int, int], how: tuple[int, int, int]) -> None:
    """heads: N, K, H; how: thread blocks, seed, parts of a dK/dV item."""
    (N, K, H), (grid, seed, parts) = heads, how
    segments = TABLES[table]()
    args = inputs(segments, N, K, H)
    scale = 0.6 * H**-0.5
    kernels = EmulatedKernels(grid=grid, seed=seed, parts=parts)
    got = emulate(kernels, segments, args, softmax_scale=scale)
    assert_matches(got, exact(segments, args, softmax_scale=scale), segments)


def test_matches_the_dense_mask_and_fused_projections() -> None:
    """q, k, v as slices of one projection, which the tensor maps read in place; dout needs a copy."""
    segments = segment_table([(20, [30, 3])], 5)
    args = inputs(segments, 4, 2, 64)
    fused = torch.cat(args[:3], dim=1)
    q, k, v = fused.split((4, 2, 2), dim=1)
    dout = torch.zeros(58, 4, 128, dtype=torch.bfloat16)[..., ::2].copy_(args[3])
    got = emulate(EmulatedKernels(), segments, [q, k, v, dout], softmax_scale=0.1)

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return dense_attention(q, k, v, segments[:-1], softmax_scale=0.1)

    expected = run(dense, [x[:53].double() for x in args])
    assert_matches([x[:53] for x in got], expected, segments[:-1])


@pytest.mark.parametrize("make", [schedule.loadable, kv_shift_rope_cuda._loadable])
@pytest.mark.parametrize(
    ("sizes", "strides"),  # contiguous for torch, all of them, but 2 bytes off 16
    [((4, 2, 64), (128, 64, 1)), ((4, 1, 64), (64, 3, 1)), ((1, 2, 64), (13, 64, 1))],
)
def test_what_16_byte_loads_cannot_read_is_copied(
    make: Callable[[torch.Tensor], torch.Tensor], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    x_TXH = torch.arange(1025).bfloat16()[1:].as_strided(sizes, strides)
    made = make(x_TXH)
    assert made.data_ptr() % 16 == 0 and made.stride() == (sizes[1] * 64, 64, 1)
    assert torch.equal(made, x_TXH) and make(made) is made


@pytest.mark.parametrize(("table", "N", "H"), [("branches", 4, 64), ("random 1", 2, 128)])
def test_bits_depend_on_no_order_and_no_grid(table: str, N: int, H: int) -> None:
    segments = TABLES[table]()
    args, tokens = inputs(segments, N, 1, H), int(segments[-1, 1]) - padding_of(segments)
    first, *others = (
        emulate(EmulatedKernels(grid, seed, parts=3), segments, args, softmax_scale=0.1)
        for grid, seed in [(1, 0), (2, 1), (7, 2), (132, 5)]
    )
    for other in others:
        assert all(torch.equal(a[:tokens], b[:tokens]) for a, b in zip(first, other, strict=True))


def test_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segment_table([(9, [4, 3])], 0)
    args = inputs(segments, 2, 1, 64)
    module = sys.modules["nova_kernels.packed_attention"]  # the name below it is the function's
    monkeypatch.setattr(module, "cuda_runs_on", lambda device: True)
    monkeypatch.setattr(_cuda, "cuda_kernels", EmulatedKernels)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return packed_attention(q, k, v, segments, return_lse=True, backend="cuda")

    assert_matches(run(attention, args), exact(segments, args, softmax_scale=0.125), segments)
    with pytest.raises(ValueError, match="cuda needs bf16, not float16"):
        q, k, v, _ = (x.half() for x in args)
        packed_attention(q, k, v, segments, backend="cuda")
    # A kernel would take addresses of another device for its own.
    elsewhere = segment_index(segments, 16).to("meta")
    with pytest.raises(ValueError, match="segments_S4_or_schedule on meta"):
        packed_attention(*args[:3], segments, schedule=elsewhere, backend="cuda")


def test_rows_of_a_padding_trunk_are_written() -> None:
    segments = segment_table([(0, [10])], 90)
    args = [x.nan_to_num(0.0) for x in inputs(segments, 2, 1, 128)]
    got = emulate(EmulatedKernels(), segments, args, softmax_scale=0.1)
    assert all(x.isfinite().all() for x in got)


def test_an_empty_pack_launches_nothing() -> None:
    segments = torch.zeros(1, 4, dtype=torch.int32)
    out, lse, *gradients = emulate(EmulatedKernels(), segments, inputs(segments, 4, 2, 64), softmax_scale=1.0)  # fmt: skip
    assert out.shape == gradients[0].shape == (0, 4, 64) and lse.shape == (0, 4)


# ---------------------------------------------------------------------------------------------- mutations
PARTS, TILES = "parts.cuh", "work.h"
FORWARD, DQ, DKV = "forward.cuh", "backward_dq.cuh", "backward_dkv.cuh"
MUTATIONS = [  # file, statement or expression, what stands there instead
    # ---- protocol: what a role waits for, what it gives back, and when
    (FORWARD, "mbar_wait(&s.q_empty, q_phase);", ""),
    (FORWARD, "mbar_wait(&s.k_empty[ring.stage], ring.phase ^ 1);", ""),
    (FORWARD, "mbar_wait(&s.v_empty[ring.stage], ring.phase ^ 1);", ""),
    (FORWARD, "mbar_wait(&s.v_full[last.stage], last.phase);", ""),
    (FORWARD, "wgmma_wait<1>();", ""),
    (FORWARD, "release(&s.v_empty[last.stage]);", "release(&s.v_empty[ring.stage]);"),
    (FORWARD, "mbar_arrive_expect_tx(&s.q_full, sizeof s.q);",
     "mbar_arrive_expect_tx(&s.q_full, sizeof s.q / 2);"),
    (FORWARD, "take_turn<ForwardTile<H>::kConsumers>(wg);", ""),
    (DQ, "mbar_wait(&s.q_empty, q_phase);", ""),
    (DQ, "mbar_wait(&s.empty[ring.stage], ring.phase ^ 1);", ""),
    (DQ, "mbar_wait(&s.full[stage], ring.phase);", ""),
    (DQ, "if (previous >= 0) release(&s.empty[previous]);", "release(&s.empty[stage]);"),
    (DKV, "mbar_wait(&s.kv_empty, kv_phase);", ""),
    (DKV, "mbar_wait(&s.empty[ring.stage], ring.phase ^ 1);", ""),
    (DKV, "mbar_wait(&s.kv_full, kv_phase);", ""),
    (PARTS, "__syncwarp();  // what stands there is whole", ""),
    (DKV, "release(&s.empty[previous]);  // of the step before", ""),
    (FORWARD, "pass_turn<ForwardTile<H>::kConsumers>(wg);", ""),  # of a warpgroup without rows
    (DQ, "mbar_wait(&s.full[ring.stage], ring.phase);", ""),
    (DKV, "mbar_wait(&s.full[ring.stage], ring.phase);", ""),
    # ---- arithmetic
    (FORWARD, "o[e] *= factor[e / 2 % 2];", "o[e] *= factor[0];"),
    (FORWARD, "z[i + 2 + e] = -INFINITY;", ""),
    (FORWARD, "sum[r] = fmaf(sum[r], factor[r], a + b);", "sum[r] += a + b;"),
    (DQ, "z[e] = 0.f;", ""),
    (DKV, "z[e] = 0.f;", ""),
    (DKV, "store_rows<H>(a.dk_TKH, dk, a.scale, a.scale, s.staging[warp_row / 16], element);",
     "store_rows<H>(a.dk_TKH, dk, 1.f, 1.f, s.staging[warp_row / 16], element);"),
    (DKV, "dp[e + 2] = z[e + 2] * (dp[e + 2] - delta.x);", "dp[e + 2] = z[e + 2] * (dp[e + 2] - delta.y);"),
    (FORWARD, "token < t.q_end", "token < a.shape.tokens"),
    (DQ, "at < t.q_end", "at < a.shape.tokens"),
    (DKV, "key < t.k_end", "key < a.shape.tokens"),
    # ---- tiles
    (TILES, "left = all - begin < each ? all - begin : each;  // <= 0: none", "left = each;"),
    (TILES, "tile = begin % tiles;", "tile = 0;"),
    (TILES, "return i < own ? t.q_end - kKeys * (i + 1) : t.prefix_end - kKeys * (i - own + 1);",
     "return i < own ? t.q_end - kKeys * (i + 1) : t.prefix_begin + kKeys * (i - own);"),
    (TILES, "return diagonal(t, i) || first_key(t, i) < lowest_key(t, i);", "return diagonal(t, i);"),
    (TILES, "return i < own && first_key(t, i) + kKeys - 1 > t.q_begin;", "return i == 0;"),
    (TILES, "return i < own ? first_query(t, i) < t.k_end - 1 : first_query(t, i) < t.branch_begin;",
     "return i < own && first_query(t, i) < t.k_end - 1;"),
    (TILES, "return i < own ? t.k_begin : t.branch_begin;", "return t.k_begin;"),
]  # fmt: skip


def switched(number: int, old: str, new: str) -> str:
    """Source that does `new` when this mutation is on: one library holds them all."""
    if ";" not in old:
        return f"(nova_mutation == {number} ? ({new}) : ({old}))"
    return f"{{ if (nova_mutation == {number}) {{ {new} }} else {{ {old}\n }} }}"


@pytest.fixture(scope="module")
def mutant() -> EmulatedKernels:
    numbered = [
        ("cuda/packed_attention/" + file, old, switched(number, old, new))
        for number, (file, old, new) in enumerate(MUTATIONS)
    ]
    return EmulatedKernels(mutations=tuple(numbered))


def seen_wrong(kernels: EmulatedKernels, N: int, K: int, H: int) -> str:
    """How a run differs from what it should give, or an empty string."""
    segments = segment_table([(130, [70, 1, 140]), (0, [20]), (17, [40, 90])], 12)
    args = inputs(segments, N, K, H)
    try:
        got = emulate(kernels, segments, args, softmax_scale=0.1)
        assert_matches(got, exact(segments, args, softmax_scale=0.1), segments)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("number", range(-1, len(MUTATIONS)))
def test_mutations_are_seen(mutant: EmulatedKernels, number: int) -> None:
    """Number -1 is none: the library with the switches itself is right."""
    active = ctypes.c_int.in_dll(mutant.library, "nova_mutation")
    active.value = number
    try:  # what is asynchronous lands late for seeds 2, 5 and 8: that shows most
        for (N, K, H), seed in itertools.product([(1, 1, 64), (4, 2, 128)], [2, 0, 5, 1, 8]):
            kernels = EmulatedKernels(1 + seed % 2, seed, mutant.mutations, parts=1 + seed % 3)
            seen = seen_wrong(kernels, N, K, H)
            assert number >= 0 or not seen, seen
            if seen or (number < 0 and seed == 0):
                return
        raise AssertionError(f"not seen: {MUTATIONS[number]}")
    finally:
        active.value = -1


# ------------------------------------------------------------------------------------------ index logic
def pairs_of(segments: torch.Tensor, N: int, K: int, H: int) -> list[torch.Tensor]:
    """How often the kernels' tiles hold each (query, key): forward and dQ lists, then dK/dV."""
    kernels, T = EmulatedKernels(), int(segments[-1, 1])
    shape = kernels.AttentionShape(T, N, K, H)
    counts = []
    for tokens in (shape.forward_tokens, shape.dq_tokens):
        queries, keys = _C.attention_tiles(segments.numpy(), tokens, shape.key_tokens)
        by_query, by_key = (torch.zeros(T, T, dtype=torch.uint8) for _ in "qk")
        call = Call(shape=shape, num_query_tiles=len(queries), num_key_tiles=len(keys))
        call.query_tiles, call.key_tiles = queries.ctypes.data, keys.ctypes.data
        message = ctypes.create_string_buffer(400)
        kernels.library.count_attention_pairs(
            ctypes.byref(call), 64, ctypes.c_void_p(by_query.data_ptr()),
            ctypes.c_void_p(by_key.data_ptr()), message, len(message),
        )  # fmt: skip
        assert message.value.decode() == ""
        counts += [by_query, by_key]
    return counts


@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 1), (12, 1), (16, 1)])
@pytest.mark.parametrize("H", [64, 128])
def test_every_allowed_pair_is_computed_once(N: int, K: int, H: int) -> None:
    rng = np.random.default_rng(N)
    tables = [make() for make in TABLES.values()]
    for longest in (3, 40, 130, 260, 500):
        tables.append(random_segments(rng, 600, max_prefix=longest, max_response=longest))
    for segments in tables:
        mask = attention_mask(segments, int(segments[-1, 1])).byte()
        for count in pairs_of(segments, N, K, H):
            assert torch.equal(count, mask)


@pytest.mark.parametrize("ctas", [1, 2, 7, 132])
@pytest.mark.parametrize("items", [1, 5, 131, 132, 133, 1000])
def test_every_item_belongs_to_one_thread_block(ctas: int, items: int) -> None:
    seen = np.zeros(items, int)
    out = np.zeros(items, np.int32)
    for cta in range(ctas):
        count = EmulatedKernels().library.attention_items(
            cta, ctas, items, out.ctypes.data_as(ctypes.c_void_p)
        )
        seen[out[:count]] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("table", ["one segment", "many tiny", "ragged"])
def test_thread_blocks_get_equal_work(table: str) -> None:
    """132 of them, 32 query and 8 key heads: the fullest has at most 12% more than the average."""
    T = 16384
    segments = {
        "one segment": lambda: segment_table([], T),
        "many tiny": lambda: segment_table([(0, [8])] * (T // 8), 0),
        "ragged": lambda: random_segments(
            np.random.default_rng(0), T, max_prefix=400, max_response=300
        ),
    }[table]()
    shape = EmulatedKernels().AttentionShape(T, 32, 8, 128)
    queries, keys = _C.attention_tiles(segments.numpy(), shape.forward_tokens, shape.key_tokens)

    def tiles(length: np.ndarray, size: int) -> np.ndarray:
        return -(-length // size)

    q, k = queries.T, keys.T
    forward = tiles(q[1] - q[2], 128) + tiles(q[4] - q[3], 128)
    backward = tiles(k[2] - k[0], 16) + tiles(k[4] - k[3], 16)
    for work in (forward, backward):
        work = np.repeat(work, 8)  # heads
        loads, out = [], np.zeros(len(work), np.int32)
        for cta in range(132):
            pointer = out.ctypes.data_as(ctypes.c_void_p)
            count = EmulatedKernels().library.attention_items(cta, 132, len(work), pointer)
            loads.append(work[out[:count]].sum())
        assert max(loads) <= 1.12 * np.mean(loads)


# ------------------------------------------------------------------------------------- rules and bindings
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"dtype": torch.float16}, "bf16, not float16"),
        ({"H": 96}, "head dim of 64 or 128, not 96"),
        ({"softmax_scale": 0.0}, "positive softmax_scale"),
        ({"softmax_scale": float("nan")}, "positive softmax_scale"),
        ({"N": 2000}, "1024 heads"),
        ({"window": 9}, "no window"),
        ({}, ""),
    ],
)
def test_rules_are_said(change: dict[str, object], rule: str) -> None:
    sizes = {"N": 4, "H": 64, "dtype": torch.bfloat16, "softmax_scale": 0.1, "window": 0} | change
    q = torch.empty(3, sizes["N"], sizes["H"], dtype=sizes["dtype"])  # type: ignore[arg-type]
    said = _cuda.broken_rule(q, softmax_scale=sizes["softmax_scale"], window=sizes["window"])  # type: ignore[arg-type]
    assert rule in said and bool(said) == bool(rule)


def test_the_backend_needs_its_gpu() -> None:
    q = torch.zeros(8, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"backend='cuda'.*Hopper GPU"):
        packed_attention(q, q, q, segment_table([], 8), backend="cuda")


def test_the_binding_checks_before_it_asks_the_driver() -> None:
    kernels = cuda_kernels()
    if kernels is None:
        pytest.skip("built without a CUDA compiler")
    shape = kernels.AttentionShape(tokens=1000, heads=12, kv_heads=1, head_dim=64)
    emulated = EmulatedKernels().AttentionShape(1000, 12, 1, 64)
    for name in ("packs", "row_stride", "forward_tokens", "dq_tokens", "key_tokens"):
        assert getattr(shape, name) == getattr(emulated, name), name
    for sizes, rule in [((0, 4, 4, 64), "tokens"), ((8, 4, 3, 64), "multiple"), ((8, 4, 4, 96), "64 or 128")]:  # fmt: skip
        with pytest.raises(ValueError, match=rule):
            kernels.AttentionShape(*sizes)
    good = {"q": (4096, 768), "k": (4096, 64), "v": (4096, 64), "query_tiles": (4096, 9)}
    good |= {"out": 4096, "lse2": 4096, "softmax_scale": 0.1, "blocks": 0, "stream": 0}
    for change, rule in [
        ({"q": (4100, 768)}, "q is not a pointer to a multiple of 16"),
        ({"k": (4096, 60)}, "k has 60 elements.*multiple of 8"),
        ({"v": (4096, 56)}, "v has 56 elements.*at least the 64"),
        ({"query_tiles": (4096, 0)}, "query_tiles holds 0"),
        ({"lse2": 4100}, "lse2"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
    ]:
        with pytest.raises(ValueError, match=rule):
            kernels.attention_forward(shape, **(good | change))
    backward = good | {
        "d_out": (4096, 768),
        "key_tiles": (4096, 9),
        "lse2_and_delta": (4096, 4096),
        "partials": 4096,
    }
    del backward["lse2"]
    with pytest.raises(ValueError, match="dk is not a pointer"):
        kernels.attention_backward(shape, dq_dk_dv=(4096, 4098, 4096), **backward)
