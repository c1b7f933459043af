"""kv_shift_rope's CUDA kernels: in the emulator, as compiled for sm_90a, and (marked gpu) on a Hopper GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nova_kernels import kv_shift_rope
from nova_kernels.backend import cuda_kernels
from nova_kernels.kv_shift_rope import _cuda, rope_tables
from nova_kernels.kv_shift_rope.state import Options, Weights
from nova_kernels.segments import segment_index
from nova_kernels.testing import (
    assert_close_to,
    poison,
    random_segments,
    seeded_normal,
    segment_table,
)
from tests.kernels.emulation import Mutation, emulated

KERNELS = "cuda/kv_shift_rope/kernels.cuh"
SHAPES = [(4, 2, 32, 16), (3, 3, 96, 48), (9, 1, 16, 8), (5, 5, 64, 8), (2, 2, 256, 128)]
"""Query heads, key/value heads, head dim, F: more heads than a thread does at a time, fewer, no multiple; partial rotation."""


class Emulated:
    """The functions of _C_cuda on the emulator."""

    def __init__(self, seed: int = 0, mutations: tuple[Mutation, ...] = ()) -> None:
        self.library, self.seed = emulated("kv_shift_rope", mutations), seed

    def call(self, name: str, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(400)
        self.library.set_seed(self.seed)
        getattr(self.library, name)(*arguments, message, len(message))
        if message.value:
            raise ValueError(message.value.decode())

    def unmix_blocks(self, tokens: int) -> int:
        return self.library.unmix_blocks(tokens)

    def shift_rope(self, parts: list[Any], *, tables: Any, stream: int, **given: Any) -> None:
        numbers = [n for i, o, heads, mix, turns in parts for n in (*i, *o, heads, mix, turns)]
        packed = (ctypes.c_int64 * len(numbers))(*numbers)
        position, previous = (ctypes.c_void_p(given[k]) for k in ("position_T", "previous_T"))
        cos, sin, F, interleaved = tables
        self.call(
            "shift_rope", packed, len(parts), position, previous, ctypes.c_void_p(cos), ctypes.c_void_p(sin), F, int(interleaved),
            given["tokens"], given["head_dim"], ctypes.c_float(given["sign"]), given["blocks"],
        )  # fmt: skip

    def unmix(self, *, tables: Any, stream: int, **given: Any) -> None:
        order = ("dy", "x", "dx", "heads", "mix_X2", "partial_BX2", "turns")
        numbers: list[int] = []
        for name in order:
            numbers += given[name] if isinstance(given[name], tuple) else (int(given[name]),)
        numbers += given["offset_T1_and_tokens_J"]
        packed = (ctypes.c_int64 * len(numbers))(*numbers)
        position, previous = (ctypes.c_void_p(given[k]) for k in ("position_T", "previous_T"))
        cos, sin, F, interleaved = tables
        self.call(
            "unmix", packed, position, previous, ctypes.c_void_p(cos), ctypes.c_void_p(sin), F, int(interleaved), given["tokens"],
            given["head_dim"],
        )  # fmt: skip


def strided(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As sliced from a fused projection: heads and dims of others between these."""
    T, X, H = shape
    whole = torch.full((T, X + 1, H + 8), torch.nan, dtype=dtype)
    whole[:, 1:, :H] = seeded_normal(T, X, H, seed=seed).to(dtype)
    return whole[:, 1:, :H]


def leaves(T: int, N: int, K: int, H: int, mixed: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Arguments with gradients by name, and upstream gradients of q, k, v."""
    heads = {"q": N, "k": K, "v": K}
    args = {n: strided(T, X, H, seed=i).requires_grad_() for i, (n, X) in enumerate(heads.items())}
    mixes = {"k_mix": "k" in mixed, "v_mix": "v" in mixed}
    args |= {n: seeded_normal(K, 2, seed=5 + i).requires_grad_() for i, n in enumerate(mixes) if mixes[n]}  # fmt: skip
    return args, [strided(T, X, H, seed=10 + i) for i, X in enumerate(heads.values())]


def run(
    args: dict[str, Tensor],
    upstream: list[Tensor],
    segments: Tensor,
    tables: tuple[Tensor, Tensor],
    interleaved: bool = False,
    *,
    cuda: bool,
) -> list[Tensor]:
    """Outputs and all gradients."""
    q, k, v, *mixes = (args.get(name) for name in ("q", "k", "v", "k_mix", "v_mix"))
    assert q is not None and k is not None and v is not None
    if cuda:
        weights = Weights(*mixes, None, None)
        assert _cuda.broken_rule(q, tables[0], weights) == ""
        index, options = segment_index(segments, len(q)), Options(interleaved, 1e-6, False)
        outputs = _cuda.kv_shift_rope_cuda(q, k, v, weights, tables, index, options)
    else:
        outputs = kv_shift_rope(q, k, v, segments, *mixes, *tables, interleaved=interleaved, backend="reference")  # fmt: skip
    wanted = list(args.values())
    return [*outputs, *torch.autograd.grad(outputs, wanted, [d.to(outputs[0]) for d in upstream])]


def wide(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in args.items()}


def check(
    shape: tuple[int, ...], segments: Tensor, mixed: str, interleaved: bool, kernels: Emulated
) -> list[Tensor]:
    N, K, H, F = shape
    T = int(segments[-1, 1])
    args, upstream = leaves(T, N, K, H, mixed)
    tables = rope_tables(T, 2 * F)
    with pytest.MonkeyPatch.context() as patch, poison():
        patch.setattr(_cuda, "cuda_kernels", lambda: kernels)
        got = run(args, upstream, segments, tables, interleaved, cuda=True)
    exact = run(wide(args), upstream, segments, tables, interleaved, cuda=False)
    plain = run(args, upstream, segments, tables, interleaved, cuda=False)
    for number, values in enumerate(zip(exact, got, plain, strict=True)):
        assert_close_to(*values, what=str(number))
    return got


MANY = segment_table([(5, [3] * 9), (0, [7, 2]), (30, [1, 40]), (1, [1, 1])], padding=11)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_head(shape: tuple[int, ...], interleaved: bool) -> None:
    check(shape, MANY, "kv", interleaved, Emulated(1))


@pytest.mark.parametrize("mixed", ["", "k", "v", "kv"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_tables_and_parts(mixed: str, seed: int) -> None:
    segments = random_segments(np.random.default_rng(seed), 150, max_prefix=20, max_response=9)
    check((4, 2, 32, 8), segments, mixed, bool(seed), Emulated(seed))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 64, 65, 129])
def test_lengths_beside_runs_and_blocks(tokens: int) -> None:
    check((2, 1, 16, 8), segment_table([(0, [tokens])], 0), "kv", False, Emulated(2))


def test_many_tiny_segments() -> None:
    check((1, 1, 16, 8), segment_table([(0, [1])] * 500, 0), "kv", False, Emulated())


def test_bits_do_not_depend_on_order_or_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed, blocks in ((0, 0), (1, 1), (2, 7)):
        monkeypatch.setattr(_cuda, "BLOCKS", blocks)
        found.append(check((4, 2, 32, 16), MANY, "kv", False, Emulated(seed)))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_q_in_place() -> None:
    tables, index = rope_tables(int(MANY[-1, 1]), 32), segment_index(MANY, int(MANY[-1, 1]))
    args, _ = leaves(index.num_tokens, 4, 2, 32, "kv")
    q, k, v = (args[name].detach() for name in "qkv")
    weights = Weights(args["k_mix"].detach(), args["v_mix"].detach(), None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "cuda_kernels", lambda: Emulated())
        fresh = _cuda.kv_shift_rope_cuda(q, k, v, weights, tables, index, Options(False, 1e-6, False))  # fmt: skip
        place = q.data_ptr()
        out = _cuda.kv_shift_rope_cuda(q, k, v, weights, tables, index, Options(False, 1e-6, True))
    assert out[0].data_ptr() == place and torch.equal(out[0], fresh[0])


MUTATIONS = [
    ("previous != t - 1 || t == first_token", "previous != t - 1"),  # a run's first row
    ("? before * p.a[i] : 0.f", "? before * p.a[i] : before * p.a[i]"),  # no predecessor
    ("carried[j] = current[j];", ""),
    ("min(kHeads, part.in.heads - head);", "min(2, part.in.heads - head);"),
    ("8 * u + table.F : first", "8 * u + 8 : first"),  # the other member of the pair
    ("y = y * cos + x * sin;", "y = y * cos - x * sin;"),
    ("previous_T[t + 1] == t;", "true;"),  # a segment's last token has no successor behind it
    ("for (int b = from; b < to; ++b)", "for (int b = from; b < from; ++b)"),
    ("position_T[t] + 1, u", "position_T[t], u"),
    ("after = here;", ""),
    ("i < kRuns * units", "i < kRuns"),
    ("= (block * kRuns + run) * kRun", "= run * kRun"),
    ("  __syncthreads();\n  if (threadIdx.x < 2", "  if (threadIdx.x < 2"),
]


@pytest.mark.parametrize("old_new", MUTATIONS, ids=[old[:30] for old, _ in MUTATIONS])
def test_changes_of_the_kernels_are_seen(old_new: tuple[str, str]) -> None:
    kernels = Emulated(2, ((KERNELS, *old_new),))
    with pytest.raises((AssertionError, ValueError)):
        check((3, 3, 32, 16), MANY, "kv", False, kernels)


def test_broken_rules_are_named() -> None:
    q, cos, none = torch.zeros(4, 2, 32, dtype=torch.bfloat16), torch.zeros(4, 16), Weights(None, None, None, None)  # fmt: skip
    assert "bf16" in _cuda.broken_rule(q.float(), cos, none)
    assert "multiple of 16 up to 256, not 24" in _cuda.broken_rule(q[..., :24], cos, none)
    assert "multiple of 16, not 8" in _cuda.broken_rule(q, cos[:, :4], none)
    assert "no norms" in _cuda.broken_rule(q, cos, none._replace(q_norm_H=torch.ones(32)))
    with pytest.raises(ValueError, match="cuda needs a Hopper GPU"):
        segments = segment_table([(0, [4])], 0)
        kv_shift_rope(q, q, q, segments, None, None, cos, cos, backend="cuda")


@pytest.mark.skipif(cuda_kernels() is None, reason="built without a CUDA compiler")
def test_bad_arguments_are_refused_without_a_driver() -> None:
    kernels: Any = cuda_kernels()
    part = ((16, 32, 32), (16, 32, 32), 1, 0, True)
    good: dict[str, Any] = {
        "position_T": 16,
        "previous_T": 16,
        "tables": (16, 16, 16, False),
        "tokens": 4,
    }
    good |= {"head_dim": 32, "sign": 1.0, "blocks": 0, "stream": 0}
    for change, rule in (
        ({"head_dim": 24}, "head_dim must be"),
        ({"tables": (16, 16, 12, False)}, "F must be"),
        ({"tables": (8, 16, 16, False)}, "cos_PF"),
        ({"tokens": 0}, "tokens must be positive"),
        ({"sign": 0.5}, "sign must be"),
        ({"parts": []}, "one to three parts"),
        ({"parts": [((8, 32, 32), *part[1:])]}, "in is not a pointer"),
        ({"parts": [((16, 33, 32), *part[1:])]}, "no multiples of 8"),
        ({"parts": [(*part[:3], 16, True)], "sign": -1.0}, "undone by unmix"),
    ):
        with pytest.raises(ValueError, match=rule):
            kernels.shift_rope(**({"parts": [part], **good} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 8, 128, 64), (48, 48, 128, 64), (16, 4, 64, 16)])
def test_cuda_on_a_gpu(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Training shapes against the reference in fp64, run-to-run and grid-to-grid bit equality."""
    N, K, H, F = shape
    segments = random_segments(np.random.default_rng(0), 8191, max_prefix=300, max_response=200)
    args, upstream = leaves(8191, N, K, H, "kv")
    args = {name: x.detach().cuda().requires_grad_() for name, x in args.items()}
    upstream = [d.cuda() for d in upstream]
    tables = tuple(t.cuda() for t in rope_tables(8191, 2 * F))
    segments = segments.cuda()
    found = []
    for blocks in (0, 0, 100):
        monkeypatch.setattr(_cuda, "BLOCKS", blocks)
        with poison():
            found.append(run(args, upstream, segments, tables, cuda=True))
    exact = run(wide(args), upstream, segments, tables, cuda=False)
    plain = run(args, upstream, segments, tables, cuda=False)
    for number, values in enumerate(zip(exact, found[0], plain, strict=True)):
        assert_close_to(*values, what=str(number))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
