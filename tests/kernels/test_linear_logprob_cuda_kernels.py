"""linear_logprob's CUDA kernels one by one in the emulator, their mutants, and what their launchers refuse.

Legend: R response rows, D hidden, V vocabulary, K tiles of columns, S ranges of them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nova_kernels.backend import cuda_kernels
from nova_kernels.testing import seeded_normal
from tests.kernels.emulated_linear_logprob import EmulatedKernels
from tests.kernels.emulation import Mutation, emulated

SENTINEL = 12345.0  # stands around every output


class Problem(NamedTuple):
    """Inputs of all three kernels, and what they should give, in fp64."""

    x_RD: Tensor
    w_VD: Tensor
    target_R: Tensor  # int32; -1: none of our columns
    inverse_norm_V: Tensor | None  # to the end of the last tile
    inverse_temperature: float
    z_RV: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (len(self.x_RD), self.x_RD.shape[1], len(self.w_VD))

    @property
    def num_tiles(self) -> int:
        return -(-len(self.w_VD) // 256)


def problem(R: int, D: int, V: int, *, norm: bool = False, temperature: float = 1.0) -> Problem:
    x_RD, w_VD = seeded_normal(R, D, seed=R).bfloat16(), seeded_normal(V, D, seed=V).bfloat16()
    generator = torch.Generator().manual_seed(R + V)
    target_R = torch.randint(-1, V, (R,), generator=generator, dtype=torch.int32)
    z_RV = x_RD.double() @ w_VD.double().t() / temperature
    inverse_norm_V = None
    if norm:
        inverse_norm_V = torch.full((-(-V // 256) * 256,), torch.nan)
        inverse_norm_V[:V] = 1.0 / w_VD.float().norm(dim=1)
        z_RV *= inverse_norm_V[:V].double()
    return Problem(x_RD, w_VD, target_R, inverse_norm_V, 1.0 / temperature, z_RV)


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """NaN of the shape, at a multiple of 16 bytes, and the buffer around it."""
    size = math.prod(shape)
    around = torch.full((size + 1024,), SENTINEL, dtype=dtype)
    around[512 : 512 + size] = torch.nan
    return around[512 : 512 + size].view(shape), around


def untouched(around: Tensor) -> bool:
    return bool((around[:512] == around[0]).all() and (around[-512:] == around[0]).all())


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Folded(NamedTuple):
    state_5SR: Tensor
    e_RV: Tensor | None
    max_KR: Tensor | None


def even_odds() -> Problem:
    """Targets of p between 0.4 and 0.5: there a rounding of p weighs as much in dz as that of dz."""
    x_RD, w_VD = torch.ones(63, 8), torch.zeros(300, 8)
    x_RD[:, 0] = torch.linspace(0.0, 3.0, 63)
    w_VD[:, 1] = -16.0
    w_VD[10], w_VD[20], w_VD[10, 0], w_VD[20, 0] = 0.0, 0.0, 1.0, 1.125
    x_RD, w_VD = x_RD.bfloat16(), w_VD.bfloat16()
    target_R = torch.full((63,), 10, dtype=torch.int32)
    return Problem(x_RD, w_VD, target_R, None, 1.0, x_RD.double() @ w_VD.double().t())


def fold(
    kernels: EmulatedKernels, p: Problem, *, splits: int, store: bool = False, **asked: bool
) -> Folded:
    R, D, V = p.sizes
    state_5SR, *arounds = guarded(5, splits, R)
    e_RV = max_KR = None
    if store:
        e_RV, around_e = guarded(R, 256 * p.num_tiles, dtype=torch.bfloat16)
        max_KR, around_max = guarded(p.num_tiles, R)
        arounds += [around_e, around_max]
    kernels.linear_logprob_fold(
        x_RD=p.x_RD.data_ptr(), w_VD=p.w_VD.data_ptr(), target_R=p.target_R.data_ptr(),
        inverse_norm_V=pointer(p.inverse_norm_V), state_5SR=state_5SR.data_ptr(),
        e_RV=pointer(e_RV), max_KR=pointer(max_KR), rows=R, dim=D, vocab=V, splits=splits,
        group=2, clusters=2, inverse_temperature=p.inverse_temperature, stream=0, **asked,
    )  # fmt: skip
    assert all(map(untouched, arounds))
    return Folded(state_5SR, e_RV, max_KR)


def state_of_range(p: Problem, begin: int, end: int) -> Tensor:
    """(5, R) in fp64, over column tiles [begin, end)."""
    z_RW = p.z_RV[:, 256 * begin : 256 * end]
    max_R, argmax_R = z_RW.max(dim=1)
    e_RW = (z_RW - max_R[:, None]).exp()
    local_R = p.target_R.long() - 256 * begin
    inside_R = (local_R >= 0) & (local_R < z_RW.shape[1])
    logit_R = z_RW.gather(1, local_R.clamp(0, z_RW.shape[1] - 1)[:, None])[:, 0]
    logit_R = torch.where(inside_R, logit_R, -torch.inf)
    moment_R = (e_RW * (z_RW - max_R[:, None])).sum(1)
    return torch.stack([max_R, e_RW.sum(1), logit_R, moment_R, (argmax_R + 256 * begin).double()])


SIZES = [(1, 64, 1000), (63, 200, 257), (129, 64, 1000), (300, 136, 300)]


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(("R", "D", "V"), SIZES)
def test_fold(R: int, D: int, V: int, store: bool) -> None:
    """In one range, in several, and in as many as there are tiles."""
    p = problem(R, D, V, norm=store, temperature=0.7 if R == 129 else 1.0)
    for splits in range(1, p.num_tiles + 1):
        options = {"entropy": splits % 2 == 1, "argmax": splits < 3}
        check_fold(EmulatedKernels(seed=R + splits), p, splits=splits, store=store, **options)


def check_fold(
    kernels: EmulatedKernels, p: Problem, *, splits: int, store: bool, entropy: bool, argmax: bool
) -> Folded:
    """States to fp32 rounding, exponentials to bf16's."""
    folded = fold(kernels, p, splits=splits, store=store, entropy=entropy, argmax=argmax)
    written = [0, 1, 2, *[3] * entropy, *[4] * argmax]
    for split in range(splits):
        begin, end = (p.num_tiles * (split + i) // splits for i in range(2))
        wanted = state_of_range(p, begin, end)[written]
        got = folded.state_5SR[written, split].double()
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-4)
    if folded.e_RV is not None and folded.max_KR is not None:
        V = len(p.w_VD)
        shift_RV = folded.max_KR.repeat_interleave(256, 0).t()[:, :V].double()
        wanted_RV = (p.z_RV - shift_RV).exp()
        assert wanted_RV.max() < 1.0 + 1e-3  # relative to a maximum
        torch.testing.assert_close(
            folded.e_RV[:, :V].double(), wanted_RV, rtol=2.0**-8 + 1e-4, atol=1e-12
        )
        assert not folded.e_RV[:, V:].any()  # beyond the vocabulary: probability 0
    return folded


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("R", "D", "V"), SIZES)
def test_dlogits(R: int, D: int, V: int, extras: bool, store: bool) -> None:
    p = problem(R, D, V, norm=extras, temperature=0.7 if R == 129 else 1.0)
    check_dlogits(EmulatedKernels(seed=R), p, extras=extras, store=store)


@pytest.mark.parametrize("store", [False, True])
def test_the_target_keeps_its_digits(store: bool) -> None:
    check_dlogits(EmulatedKernels(), even_odds(), extras=False, store=store)


def wanted_dlogits(p: Problem, *, extras: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dz (R, V) in fp64, the kernels' rows_8R, and by how much dz moves with log p."""
    R = len(p.x_RD)
    max_R, argmax_R = p.z_RV.max(dim=1)
    sum_R = (p.z_RV - max_R[:, None]).exp().sum(1)
    target_R, row_R = p.target_R.long(), torch.arange(R)
    logit_R = p.z_RV.gather(1, target_R.clamp(min=0)[:, None])[:, 0]
    g_R, h_R, k_R = seeded_normal(3, R, seed=1, dtype=torch.float64)
    log_p_RV = p.z_RV - max_R[:, None] - sum_R.log()[:, None]
    entropy_R = -(log_p_RV.exp() * log_p_RV).sum(1)
    scalars = [max_R, sum_R.log2(), logit_R, g_R, h_R, entropy_R, k_R, argmax_R.double()]
    rows_8R = torch.stack(scalars).float()
    if not extras:
        h_R, k_R, rows_8R[4:] = 0.0 * h_R, 0.0 * k_R, torch.nan  # not read
    dz_RV = -log_p_RV.exp() * (g_R[:, None] + h_R[:, None] * (log_p_RV + entropy_R[:, None]))
    ours_R = target_R >= 0
    dz_RV[row_R[ours_R], target_R[ours_R]] += g_R[ours_R]
    dz_RV[row_R, argmax_R] += k_R
    if p.inverse_norm_V is not None:
        dz_RV *= p.inverse_norm_V[: len(p.w_VD)].double()
    return dz_RV, rows_8R, log_p_RV.exp() * h_R.abs()[:, None]


def check_dlogits(kernels: EmulatedKernels, p: Problem, *, extras: bool, store: bool) -> None:
    """Rounded once to bf16, in waves of one and two tiles, from logits and from exponentials."""
    R, D, V = p.sizes
    wanted_RV, rows_8R, slope_RV = wanted_dlogits(p, extras=extras)
    folded = None
    if store:
        folded = check_fold(kernels, p, splits=1, store=True, entropy=False, argmax=False)
    for start, tiles in ((0, 1), (256 * (p.num_tiles - 2), 2)):
        stop = min(start + 256 * tiles, V)
        width = 256 * tiles + 8  # rows of a wider block
        dz_RW, around = guarded(R, width, dtype=torch.bfloat16)
        wave = {
            "target_R": p.target_R.data_ptr(), "inverse_norm_V": pointer(p.inverse_norm_V),
            "rows_8R": rows_8R.data_ptr(), "dz_RW": dz_RW.data_ptr(), "rows": R, "vocab": V, "width": width,
            "wave_start": start, "wave_tiles": tiles, "extras": extras, "stream": 0,
        }  # fmt: skip
        if folded is not None:
            kernels.linear_logprob_stored_dlogits(
                e_RV=pointer(folded.e_RV), max_KR=pointer(folded.max_KR), **wave
            )
        else:
            kernels.linear_logprob_dlogits(
                x_RD=p.x_RD.data_ptr(), w_VD=p.w_VD.data_ptr(), dim=D, group=1, clusters=2,
                inverse_temperature=p.inverse_temperature, **wave,
            )  # fmt: skip
        error_RW = (dz_RW[:, : stop - start].double() - wanted_RV[:, start:stop]).abs()
        # A stored exponential is rounded too, which moves p and, for the entropy, log p: of all but the target.
        others_RV = store * torch.ones_like(wanted_RV)
        others_RV[torch.arange(R), p.target_R.clamp(min=0).long()] = 0.0
        allowed_RV = (wanted_RV.abs() * (1.02 + others_RV) + slope_RV * others_RV) * 2.0**-8
        assert bool((error_RW <= allowed_RV[:, start:stop] + 2e-5).all())
        assert untouched(around) and dz_RW[:, 256 * tiles :].isnan().all()


@pytest.mark.parametrize(
    ("rows", "tiles", "splits", "group"),
    itertools.product((1, 256, 257, 1000), (1, 3, 501), (1, 2, 3), (1, 2, 16)),
)
def test_every_pair_of_rows_meets_every_tile_once(
    rows: int, tiles: int, splits: int, group: int
) -> None:
    splits, pairs = min(splits, tiles), -(-rows // 256)
    items_N4 = torch.full((pairs * splits, 4), -1, dtype=torch.int32)
    library = emulated("linear_logprob")
    address = ctypes.c_void_p(items_N4.data_ptr())
    assert library.linear_logprob_work(rows, tiles, splits, group, address) == pairs * splits
    met = torch.zeros(pairs, tiles, dtype=torch.int32)
    for pair, split, begin, end in items_N4.tolist():
        assert tiles * split // splits == begin < end
        met[pair, begin:end] += 1
    assert (met == 1).all()
    first = [item[0] // group for item in items_N4.tolist()]
    assert first == sorted(first)  # one group of pairs after the other


TILES, FOLD, DLOGITS = (f"cuda/linear_logprob/{name}.cuh" for name in ("tiles", "fold", "dlogits"))


MUTANTS = [
    # The protocol. A stage refilled while it is read; read before it is there; fewer bytes expected
    # than land; one CTA's consent taken for both; handed back while products read it; ...
    (TILES, "mbar_wait(&s.empty", "if (!ON) mbar_wait(&s.empty"),
    (TILES, "mbar_wait(&s.full", "if (!ON) mbar_wait(&s.full"),
    (TILES, "kXBytes + 2 * kWHalfBytes", "kXBytes + (ON ? 1 : 2) * kWHalfBytes"),
    (TILES, "mbar_init(&s.empty[i], 4)", "mbar_init(&s.empty[i], ON ? 2 : 4)"),
    (TILES, "wgmma_wait<1>()", "if (!ON) wgmma_wait<1>()"),
    # ... logits folded before they are complete; half of the weight sent to one CTA only; the last
    # stage kept; a box overwritten while it is copied out; copied out before it is written; a CTA
    # gone while its peer still signals it.
    (TILES, "wgmma_wait<0>()", "if (!ON) wgmma_wait<0>()"),
    (TILES, "rank * kHalfN, 3)", "rank * kHalfN, ON ? 1 << rank : 3)"),
    (TILES, "keep(z);\n  if (thread < 2)", "keep(z);\n  if (!ON && thread < 2)"),
    (TILES, "if (threadIdx.x % 128 == 0) tma_store_wait_read", "if (!ON && threadIdx.x % 128 == 0) tma_store_wait_read"),
    (TILES, "fence_proxy_async();\n    bar_sync", "if (!ON) bar_sync"),
    (TILES, "__syncwarp();\n  cluster_sync()", "if (!ON) cluster_sync()"),
    # Arithmetic. Only the last step of the depth; one column of padding; NormHead's neighbour; old sums not
    # rescaled, old moments not moved; the last of equal maxima; -inf - -inf.
    (TILES, "(k | kk) != 0", "(ON ? kk : k | kk) != 0"),
    (TILES, ">= vocab - column", ">= vocab - column + ON"),
    (TILES, "z[i + 2] *= scale.x", "z[i + 2] *= ON ? scale.y : scale.x"),
    (FOLD, "fmaf(rows[r].sum, decay", "fmaf(rows[r].sum, ON ? 1.f : decay"),
    (FOLD, "fmaf(drop, rows", "fmaf(ON ? 0.f : drop, rows"),
    (FOLD, "other < row.argmax ? other", "(other < row.argmax) != ON ? other"),
    (FOLD, "top[0] == -INFINITY ?", "!ON && top[0] == -INFINITY ?"),
    # dz without the entropy's part, with the target's p from its bf16 exponential, without the target, and
    # of the first wave always.
    (DLOGITS, "fmaf(h, in[5 * plane]", "fmaf(ON ? 0.f : h, in[5 * plane]"),
    (DLOGITS, "i == t.target ? exp2_fast(sure)", "!ON && i == t.target ? exp2_fast(sure)"),
    (DLOGITS, "if (column == t.target)", "if (!ON && column == t.target)"),
    (DLOGITS, "int v = a.wave_start / kN + item.split", "int v = ON ? item.split : a.wave_start / kN + item.split"),
]  # fmt: skip
"""(file, text, text that does something else where ON holds)"""
SEEDS = (5, 2, 0)  # late, late and mixed; with 5 a CTA also outlives its peer by enough


def all_mutants() -> tuple[Mutation, ...]:
    """One copy of the source with every change in it, each behind a number: one compilation."""
    return tuple(
        (file, old, new.replace("ON", f"(::nova_mutant == {number})"))
        for number, (file, old, new) in enumerate(MUTANTS, start=1)
    )


def check_everything(kernels: EmulatedKernels) -> None:
    """All three kernels, with ties, a tile of -inf, a sure token, and a ring that wraps within an item."""
    for store in (False, True):
        check_dlogits(kernels, problem(130, 136, 513, norm=True), extras=True, store=store)
    p = problem(130, 72, 600)
    p.w_VD[300:] = p.w_VD[:300]  # every maximum twice
    p = p._replace(z_RV=p.x_RD.double() @ p.w_VD.double().t())
    check_fold(kernels, p, splits=1, store=True, entropy=True, argmax=True)
    check_dlogits(kernels, even_odds(), extras=False, store=True)
    w_VD = torch.zeros(300, 8, dtype=torch.bfloat16)
    w_VD[:256], w_VD[256] = -torch.inf, 11.5
    x_RD = torch.ones(1, 8, dtype=torch.bfloat16)
    z_RV = torch.full((1, 300), -torch.inf, dtype=torch.float64)
    z_RV[:, 256:] = w_VD[256:, 0].double() * 8.0
    target_R = torch.tensor([256], dtype=torch.int32)
    infinite = Problem(x_RD, w_VD, target_R, None, 1.0, z_RV)
    check_fold(kernels, infinite, splits=1, store=False, entropy=False, argmax=False)


def test_everything_without_a_mutation() -> None:
    for seed in SEEDS:
        check_everything(EmulatedKernels(seed=seed, mutations=all_mutants()))


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1))
def test_mutants_are_caught(number: int) -> None:
    """By a wrong number, a NaN, or a broken rule of the emulator, for one seed at the latest."""
    with pytest.raises((AssertionError, ValueError)):
        for seed in SEEDS:
            check_everything(EmulatedKernels(seed, all_mutants(), number))


FINE: dict[str, dict[str, float]] = {
    "linear_logprob_fold": {
        "x_RD": 1 << 20, "w_VD": 1 << 20, "target_R": 1 << 20, "inverse_norm_V": 0, "state_5SR": 1 << 20, "e_RV": 0,
        "max_KR": 0, "rows": 300, "dim": 64, "vocab": 1000, "splits": 4, "group": 1, "clusters": 66,
        "inverse_temperature": 1.0, "entropy": False, "argmax": False, "stream": 0,
    },
    "linear_logprob_dlogits": {
        "x_RD": 1 << 20, "w_VD": 1 << 20, "target_R": 1 << 20, "inverse_norm_V": 0, "rows_8R": 1 << 20,
        "dz_RW": 1 << 20, "rows": 300, "dim": 64, "vocab": 1000, "width": 512, "wave_start": 512, "wave_tiles": 2,
        "group": 8, "clusters": 66, "inverse_temperature": 1.0, "extras": False, "stream": 0,
    },
    "linear_logprob_stored_dlogits": {
        "e_RV": 1 << 20, "max_KR": 1 << 20, "target_R": 1 << 20, "inverse_norm_V": 0, "rows_8R": 1 << 20,
        "dz_RW": 1 << 20, "rows": 300, "vocab": 1000, "width": 512, "wave_start": 512, "wave_tiles": 2, "extras": False,
        "stream": 0,
    },
}  # fmt: skip
BAD = {
    "x_RD": [0, 8], "w_VD": [0, 24], "target_R": [0, 2], "state_5SR": [0, 2], "rows_8R": [0, 1],
    "dz_RW": [0, 8], "inverse_norm_V": [4], "e_RV": [8], "max_KR": [2],
    "rows": [0, -1, 0x7FFFFFFF], "dim": [0, 4, 12], "vocab": [0, 0x7FFFFFFF], "splits": [0, 5],
    "group": [0], "clusters": [0], "inverse_temperature": [0.0, -1.0, math.inf, math.nan],
    "width": [256, 510], "wave_start": [-256, 100, 1024], "wave_tiles": [0, 3],
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_launchers_refuse_bad_arguments(name: str) -> None:
    """Before they touch the driver, and by a ValueError that names the rule."""
    kernels = cuda_kernels()
    if kernels is None:
        pytest.skip("the CUDA extension was built without nvcc")
    launch: Callable[..., None] = getattr(kernels, name)
    refused = [(key, value) for key in FINE[name] for value in BAD.get(key, ())]
    refused += [("e_RV", 1 << 20), ("max_KR", 1 << 20)] * (name == "linear_logprob_fold")
    assert len(refused) > 15
    for key, value in refused:
        with pytest.raises(ValueError, match=r"\w+ (must|is|are) "):
            launch(**(FINE[name] | {key: value}))
