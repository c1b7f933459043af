"""The Triton kernels of kv_shift_rope against the reference: every kind of head, and training shapes on a GPU.

tests/kernels/test_kv_shift_rope.py holds both against the token-by-token definition.
"""

import numpy as np
import pytest
import torch

from nova_kernels import kv_shift_rope
from nova_kernels.backend import triton_runs_on
from nova_kernels.kv_shift_rope import rope_tables
from nova_kernels.segments import segment_index
from nova_kernels.testing import (
    assert_close_to,
    poison,
    random_segments,
    seeded_normal,
    segment_table,
)

on_cpu = pytest.mark.skipif(
    not triton_runs_on(torch.device("cpu")), reason="Triton is not installed, or a GPU runs it"
)


def inputs(T, N, K, H, dtype):
    """[q, k, v, k_mix, v_mix] with gradients, and upstream gradients of q, k, v."""
    shapes = ((T, N, H), (T, K, H), (T, K, H), (K, 2), (K, 2))
    args = [seeded_normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    return args, [seeded_normal(*s, seed=9 + i, dtype=dtype) for i, s in enumerate(shapes[:3])]


def gradients(outputs, args, upstream):
    return torch.autograd.grad(outputs, args, upstream)


@pytest.mark.parametrize("shape", [(4, 2, 32, 16), (3, 3, 96, 48), (16, 1, 16, 4), (2, 2, 6, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
@on_cpu
def test_triton_on_every_kind_of_head(shape, interleaved):
    """Odd numbers of heads, head dims that are no power of two, partial rotation, strided inputs,
    several blocks of tokens, and many branches behind one token; scratch and padding poisoned."""
    N, K, H, F = shape
    segments = segment_table([(5, [3] * 9), (0, [7, 2]), (30, [1, 40])], padding=11)
    T = int(segments[-1, 1])
    tables = rope_tables(80, 2 * F)

    def strided(T, X, H, seed):  # as sliced from a fused projection
        whole = seeded_normal(T, X + 1, H + 2, seed=seed)
        return whole[:, 1:, :H].requires_grad_()

    q, k, v = strided(T, N, H, 0), strided(T, K, H, 1), strided(T, K, H, 2)
    mixes = [seeded_normal(K, 2, seed=3 + i).requires_grad_() for i in range(2)]
    args = [q, k, v, *mixes]
    upstream = [strided(T, X, H, 7 + i).detach() for i, X in enumerate((N, K, K))]

    def results(backend, args, upstream):
        out = kv_shift_rope(
            *args[:3], segments, *args[3:], *tables, interleaved=interleaved, backend=backend
        )
        return [*out, *gradients(out, args, upstream)]

    with poison():
        got, again = (results("triton", args, upstream) for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = results("reference", wide, [d.double() for d in upstream])
    plain = results("reference", args, upstream)
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 8, 128, 64), (48, 48, 128, 64), (16, 4, 64, 16)])
def test_triton_on_a_gpu(shape, dtype):
    """Training shapes; gradients of every argument, and run-to-run bit equality."""
    N, K, H, F = shape
    segments = random_segments(np.random.default_rng(0), 8191, max_prefix=300, max_response=200)
    index = segment_index(segments, 8191).to("cuda")
    tables = [table.cuda() for table in rope_tables(1000, 2 * F)]
    args, upstream = inputs(8191, N, K, H, dtype)
    args = [x.detach().cuda().requires_grad_() for x in args]
    upstream = [d.cuda() for d in upstream]

    def results(backend, args, upstream):
        out = kv_shift_rope(
            *args[:3], segments, *args[3:], *tables, schedule=index, backend=backend
        )
        return [*out, *gradients(out, args, upstream)]

    with poison():
        got, again = (results("triton", args, upstream) for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in args]
    exact = results("reference", wide, [d.double() for d in upstream])
    plain = results("reference", args, upstream)
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
