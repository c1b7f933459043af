"""Cases of packed_attention: ours with prefixes shared and not, FlexAttention on the same rule, and what others do with every answer behind a
copy of its prefix: torch's variable-length attention, cuDNN where all are equally long, Transformer Engine where it is installed.

Rates count the allowed (query, key) pairs of the shared documents only, so a provider that computes a prefix twice has a lower rate;
`documents_per_s` compares what each gets done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import Case, Provider, leaf, runnable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nova_kernels import packed_attention
from nova_kernels.packed_attention.reference import attention_mask
from nova_kernels.segments import segment_ids, segment_index
from nova_kernels.testing import segment_table

Documents = Sequence[tuple[int, Sequence[int]]]
"""Per document the length of its prefix and of each answer."""
RATIOS = (0.5, 1.3, 4.0, 11.0)
"""Prefix to answer, of preference pairs: from chat to long documents."""


@dataclass(frozen=True)
class Shape:
    T: int
    N: int = 32
    K: int = 8
    H: int = 128

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (leaf(device, self.T, X, self.H, seed=i) for i, X in enumerate((self.N, self.K, self.K)))  # fmt: skip
        return q, k, v


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


def unshared(documents: Documents) -> Documents:
    """The same answers, each behind a prefix of its own."""
    return [(0, [prefix + answer]) for prefix, answers in documents for answer in answers]


def pairs_of(ratio: float, T: int) -> Documents:
    prefix, answer = round(512 * ratio), 512
    return [(prefix, [answer, answer])] * (T // (prefix + 2 * answer))


def layouts(device: torch.device, tiny: bool) -> Iterator[tuple[str, Shape, Documents]]:
    if tiny:
        yield "pairs, shared", Shape(128, 2, 1, 64), [(20, [9, 12]), (30, [11, 5])]
        return
    if device.type == "cpu":
        yield "4 x 512, causal", Shape(2048, 8, 4, 64), [(0, [512])] * 4
        yield "pairs of hh-rlhf's lengths", Shape(2048, 8, 4, 64), preference_documents(2048)
        return
    T = 16384
    ragged = unshared(preference_documents(T // 2))
    cases: dict[str, tuple[int, Documents]] = {
        "8192, causal": (T, [(0, [8192])] * 2),
        "pairs, prefix 1.3 answers": (T, pairs_of(1.3, T)),
        "ragged, hh-rlhf's lengths, nothing shared": (T, ragged),
    }
    for shape in (Shape(T), Shape(T, 48, 48), Shape(T, H=64)):
        for name, (_, documents) in cases.items():
            yield name, shape, documents
    for length in (1024, 2048, 4096, 16384):
        yield f"{length}, causal", Shape(T), [(0, [length])] * (T // length)
    yield "32768, causal", Shape(2 * T), [(0, [2 * T])]
    for ratio in RATIOS:
        if ratio != 1.3:
            yield f"pairs, prefix {ratio:g} answers", Shape(T), pairs_of(ratio, T)
    yield "pairs of hh-rlhf's lengths", Shape(T), preference_documents(T)
    yield "prefix 6144 and 4 answers of 512", Shape(T), [(6144, [512] * 4)] * 2


def cases(device: torch.device, tiny: bool, backends: Sequence[str]) -> Iterator[Case]:
    for name, shape, documents in layouts(device, tiny):
        inputs = shape.inputs(device)
        providers = {
            backend: Provider(forward=_ours(inputs, documents, backend), inputs=inputs)
            for backend in runnable(backends, device, tiny)
        }
        if device.type == "cpu" and not tiny:
            segments = _table(documents, shape.T)
            providers["torch, one mask for all"] = Provider(
                forward=_masked(*inputs, segments), inputs=inputs
            )
        elif not tiny:
            providers |= _others(inputs, documents, shape, device, backends)
        area, moved = _allowed(documents), 2 * shape.T * (2 * shape.N + 2 * shape.K) * shape.H
        yield Case(
            name=f"{name}, {shape.N}/{shape.K} heads of {shape.H}",
            providers=providers,
            bytes=(moved, 2 * moved),
            flops=(4 * area * shape.N * shape.H, 10 * area * shape.N * shape.H),
            documents=len(documents),
        )


def _others(
    inputs: tuple[Tensor, Tensor, Tensor],
    documents: Documents,
    shape: Shape,
    device: torch.device,
    backends: Sequence[str],
) -> dict[str, Provider]:
    """On a GPU. Whose inputs are not ours do the same documents with every prefix copied."""
    providers: dict[str, Provider] = {}
    if any(prefix for prefix, _ in documents):  # it takes seconds to compile for a shape
        segments = _table(documents, shape.T).to(device)
        for name, each_time in (("", False), (", its mask made each time", True)):
            forward = _made(_flex, *inputs, segments, each_time)
            providers[f"FlexAttention{name}"] = Provider(forward=forward, inputs=inputs)
    lengths = [length for _, (length,) in unshared(documents)]
    copied = Shape(sum(lengths), shape.N, shape.K, shape.H).inputs(device)
    if copied[0].shape != inputs[0].shape or any(prefix for prefix, _ in documents):
        for backend in runnable([b for b in backends if b != "reference"], device, False):
            providers[f"{backend}, nothing shared"] = Provider(
                forward=_ours(copied, unshared(documents), backend), inputs=copied, comparable=False
            )
    callers: dict[str, Callable[..., Any]] = {"torch varlen, nothing shared": _varlen}
    if len(set(lengths)) == 1:
        callers["cuDNN, nothing shared"] = _cudnn
    callers["Transformer Engine, nothing shared"] = _transformer_engine
    for name, make in callers.items():
        try:
            forward = _made(make, *copied, lengths)
            providers[name] = Provider(forward=forward, inputs=copied, comparable=False)
        except ImportError:
            continue  # not installed
    return providers


def _made(make: Callable[..., Any], *given: Any) -> Any:
    """What `make` gives; if it fails, what fails so when it is called: a peer's fault is a row, and costs no other's numbers."""
    try:
        return make(*given)
    except ImportError:
        raise
    except Exception as error:
        problem = error

    def fails() -> tuple[Tensor, ...]:
        raise problem

    return fails


def _table(documents: Documents, T: int) -> Tensor:
    used = sum(prefix + sum(answers) for prefix, answers in documents)
    return segment_table(documents, T - used)


def _ours(inputs: tuple[Tensor, ...], documents: Documents, backend: str) -> Any:
    T, device = len(inputs[0]), inputs[0].device
    segments = _table(documents, T)
    schedule = segment_index(segments, T).to(device)
    call = partial(packed_attention, *inputs, segments.to(device), schedule=schedule, backend=backend)  # fmt: skip
    return lambda: (call(),)


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

    def call() -> tuple[Tensor]:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask_TT, enable_gqa=True)
        return (out[0].transpose(0, 1),)

    return call


def _flex(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, with_mask: bool) -> Any:
    """The same rule as a FlexAttention mask, made before the clock starts, or in every call as for every new pack."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[0]
    segment_T = segment_ids(segments, T)
    first_T, last_T = (segments[segment_T, column] for column in (2, 3))

    def allowed(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (segment_T[i] == segment_T[j]) & (j <= i)
        return own | ((j >= first_T[i]) & (j < last_T[i]))

    make_mask = partial(torch.compile(create_block_mask), allowed, None, None, T, T, device=q.device)  # fmt: skip
    mask = make_mask()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> tuple[Tensor]:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        block_mask = make_mask() if with_mask else mask
        out = compiled(*heads_first, block_mask=block_mask, enable_gqa=True)
        return (out[0].transpose(0, 1),)

    return call


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Any:
    """torch's flash attention. Where it has no grouped heads, they are repeated in the call."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest, group = _ends(lengths, q.device), max(lengths), q.shape[1] // k.shape[1]

    def call() -> tuple[Tensor]:
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        return (varlen_attn(q, keys, values, ends, ends, longest, longest, window_size=(-1, 0)),)

    return call


def _cudnn(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Any:
    """Equally long sequences as a batch."""

    def call() -> tuple[Tensor]:
        batch = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return (out.transpose(1, 2).flatten(0, 1),)

    return call


def _transformer_engine(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Any:
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    ends, longest = _ends(lengths, q.device), max(lengths)
    attention = te.DotProductAttention(
        q.shape[1], q.shape[2], num_gqa_groups=k.shape[1], qkv_format="thd", attn_mask_type="padding_causal"
    )  # fmt: skip

    def call() -> tuple[Tensor]:
        out = attention(
            q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )  # fmt: skip
        return (out.view_as(q),)

    return call
