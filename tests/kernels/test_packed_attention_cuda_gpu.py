"""packed_attention's CUDA kernels on a Hopper GPU: the emulator's cases, training sizes, and the same bits every run.

When all of these have passed on an H100, packed_attention may let "auto" choose them there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nova_kernels import packed_attention
from nova_kernels.backend import cuda_runs_on
from nova_kernels.packed_attention import _cuda
from nova_kernels.segments import segment_index
from nova_kernels.testing import poison, random_segments, segment_table
from tests.kernels.packed_attention_cases import (
    TABLES,
    Attention,
    assert_matches,
    exact,
    inputs,
    padding_of,
    run,
)

pytestmark = pytest.mark.gpu
SHAPES = [(32, 8, 128), (48, 48, 128), (12, 4, 128), (16, 4, 64), (8, 8, 64), (16, 1, 64)]


def ours(segments: torch.Tensor, scale: float) -> Attention:
    if not cuda_runs_on(torch.device("cuda")):
        pytest.skip("needs a GPU of compute capability 9.0 and the CUDA extension")
    index = segment_index(segments, int(segments[-1, 1])).to("cuda")

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return packed_attention(
            q, k, v, segments, schedule=index, softmax_scale=scale, return_lse=True, backend="cuda"
        )

    return attention


def check(segments: torch.Tensor, N: int, K: int, H: int) -> None:
    """Against fp64, with NaN in the padding and in every buffer before the launch; twice the same bits."""
    args, scale = inputs(segments, N, K, H, "cuda"), 0.8 * H**-0.5
    attention = ours(segments, scale)
    with poison():
        got, again = run(attention, args), run(attention, args)
    assert_matches(got, exact(segments, args, softmax_scale=scale), segments)
    tokens = int(segments[-1, 1]) - padding_of(segments)
    assert all(torch.equal(a[:tokens], b[:tokens]) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 1), (4, 1), (8, 1), (6, 2), (16, 1)])
def test_small_packs(table: str, N: int, K: int, H: int) -> None:
    check(TABLES[table](), N, K, H)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_packs(shape: tuple[int, int, int]) -> None:
    for segments in (
        random_segments(np.random.default_rng(0), 4095, max_prefix=300, max_response=200),
        segment_table([(1500, [100] * 12)], 1395),
        segment_table([(2, [3, 1])] * 500, 7),
        segment_table([], 4095),
    ):
        check(segments, *shape)


@pytest.mark.parametrize("H", [64, 128])
def test_a_long_segment(H: int) -> None:
    check(segment_table([], 20001), 2, 1, H)


def test_slices_of_a_fused_projection() -> None:
    segments = TABLES["branches"]()
    args = inputs(segments, 8, 2, 128, "cuda")
    sliced = torch.cat(args[:3], dim=1).split((8, 2, 2), dim=1)
    attention = ours(segments, 0.1)
    apart, together = run(attention, args), run(attention, [*sliced, args[3]])
    tokens = int(segments[-1, 1]) - padding_of(segments)
    assert all(torch.equal(a[:tokens], b[:tokens]) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("shape", [(8, 2, 128), (8, 2, 64)])
def test_bits_depend_on_no_grid_and_no_neighbour(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 runs, on few and on many multiprocessors, every second one beside another stream's work."""
    segments = random_segments(np.random.default_rng(3), 3001, max_prefix=400, max_response=300)
    args, attention = inputs(segments, *shape, "cuda"), ours(segments, 0.1)
    tokens = int(segments[-1, 1]) - padding_of(segments)
    first = run(attention, args)
    other, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for number in range(20):
        monkeypatch.setattr(_cuda, "BLOCKS", (0, 1, 7, 64)[number % 4])
        if number % 2:
            with torch.cuda.stream(other):
                for _ in range(8):
                    torch.mm(noise, noise)
        again = run(attention, args)
        assert all(torch.equal(a[:tokens], b[:tokens]) for a, b in zip(first, again, strict=True))
    torch.cuda.synchronize()


def test_nothing_is_written_outside_a_segments_rows() -> None:
    """Two packs that differ in one segment only: every other row keeps its bits."""
    segments = segment_table([(70, [50]), (0, [33]), (90, [41, 77])], 0)
    args, attention = inputs(segments, 4, 2, 128, "cuda"), ours(segments, 0.1)
    first = run(attention, args)
    changed = [x.clone() for x in args]
    for x in changed:
        x[120:153] = -x[120:153] * 3
    second = run(attention, changed)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[:120], b[:120]) and torch.equal(a[153:], b[153:])
