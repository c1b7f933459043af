"""Cases of packed_attention: ours, FlexAttention, and torch's variable-length attention on documents that share nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import Case, Provider, leaf, runnable
from torch import Tensor

from nova_kernels import packed_attention
from nova_kernels.packed_attention.reference import attention_mask
from nova_kernels.segments import segment_ids, segment_index
from nova_kernels.testing import segment_table

Documents = Sequence[tuple[int, Sequence[int]]]
"""Per document the length of its prefix and of each answer."""


def preference_documents(T: int) -> Documents:
    """Pairs of hh-rlhf's lengths, until T tokens are full: prefix three fifths, two answers a fifth each."""
    rng = np.random.default_rng(0)
    documents: list[tuple[int, list[int]]] = []
    used = 0
    while True:
        length = int(np.clip(rng.lognormal(5.12, 0.73), 10, T // 4))
        if used + length > T:
            return documents
        prefix = length * 3 // 5
        answers = [(length - prefix) // 2, (length - prefix + 1) // 2]
        documents.append((prefix, answers))
        used += length


def layouts(device: torch.device, tiny: bool) -> dict[str, tuple[int, Documents]]:
    """Name -> tokens, documents."""
    if tiny:
        return {"pairs, shared": (128, [(20, [9, 12]), (30, [11, 5])])}
    if device.type == "cpu":
        return {
            "4 x 512, causal": (2048, [(0, [512])] * 4),
            "pairs of hh-rlhf's lengths, shared": (2048, preference_documents(2048)),
        }
    return {
        "16 x 1024, causal": (16384, [(0, [1024])] * 16),
        "1 x 16384, causal": (16384, [(0, [16384])]),
        "pairs of hh-rlhf's lengths, shared": (16384, preference_documents(16384)),
        "prefix 6144 and 4 answers of 512, shared": (16384, [(6144, [512] * 4)] * 2),
    }


def cases(device: torch.device, tiny: bool, backends: Sequence[str]) -> Iterator[Case]:
    N, K, H = (2, 1, 64) if tiny else (8, 4, 64) if device.type == "cpu" else (32, 8, 128)
    for name, (T, documents) in layouts(device, tiny).items():
        used = sum(prefix + sum(answers) for prefix, answers in documents)
        segments = segment_table(documents, T - used)
        q, k, v = (leaf(device, T, X, H, seed=i) for i, X in enumerate((N, K, K)))
        call = partial(
            packed_attention,
            *(q, k, v, segments.to(device)),
            schedule=segment_index(segments, T).to(device),
        )
        providers: dict[str, Provider] = {}

        def add(
            name: str, forward: Any, inputs: tuple[Tensor, ...], comparable: bool = True
        ) -> None:
            providers[name] = Provider(forward=forward, inputs=inputs, comparable=comparable)  # noqa: B023

        for backend in runnable(backends, device, tiny):
            add(backend, partial(_single, partial(call, backend=backend)), (q, k, v))
        if device.type == "cpu":
            masked = _masked(q, k, v, segments)
            add("torch, one mask for all", partial(_single, masked), (q, k, v))
        elif not tiny:
            flex = _flex(q, k, v, segments.to(device))
            add("FlexAttention, compiled", partial(_single, flex), (q, k, v))
            forward, inputs = _varlen(documents, N, K, H, device)
            add("torch varlen, nothing shared", partial(_single, forward), inputs, False)
        area = _allowed(documents)
        moved = 2 * T * (2 * N + 2 * K) * H
        yield Case(
            name=f"{name}, {N}/{K} heads of {H}",
            providers=providers,
            bytes=(moved, 2 * moved),
            flops=(4 * area * N * H, 10 * area * N * H),
        )


def _single(call: Any) -> tuple[Tensor, ...]:
    return (call(),)


def _allowed(documents: Documents) -> int:
    """(query, key) pairs that the rule allows."""
    area = 0
    for prefix, answers in documents:
        area += prefix * (prefix + 1) // 2
        area += sum(n * prefix + n * (n + 1) // 2 for n in answers)
    return area


def _masked(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Any:
    """torch's attention over the whole pack with a T x T mask, made before the clock starts."""
    mask_TT = attention_mask(segments, q.shape[0])

    def call() -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask_TT, enable_gqa=True)
        return out[0].transpose(0, 1)

    return call


def _flex(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Any:
    """The same rule as a FlexAttention mask, made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[0]
    segment_T = segment_ids(segments, T)
    first_T, last_T = (segments[segment_T, column] for column in (2, 3))

    def allowed(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (segment_T[i] == segment_T[j]) & (j <= i)
        return own | ((j >= first_T[i]) & (j < last_T[i]))

    mask = create_block_mask(allowed, None, None, T, T, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def _varlen(
    documents: Documents, N: int, K: int, H: int, device: torch.device
) -> tuple[Any, tuple[Tensor, ...]]:
    """Every answer behind a copy of its prefix, by torch's flash attention; key heads repeated before the clock starts."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = [prefix + n for prefix, answers in documents for n in answers]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    total, longest = int(ends[-1]), max(lengths)
    q, k, v = (leaf(device, total, N, H, seed=i) for i in range(3))
    causal = partial(varlen_attn, q, k, v, ends, ends, longest, longest, window_size=(-1, 0))
    return causal, (q, k, v)
