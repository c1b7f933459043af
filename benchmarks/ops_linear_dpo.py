"""Cases of linear_dpo_loss: hidden states -> loss and the gradients of hidden states and weight, beside what others do with the same pairs.

The unit of work is the response rows alone: R rows that predict a token of an answer. Liger computes logits of whole padded sequences, and
so does its fused cross-entropy here; that they do more than needed lowers their rate, as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from ops_packed_attention import Documents, preference_documents
from timing import Case, Provider, leaf, runnable
from torch import Tensor

from nova_kernels import linear_dpo_loss

BETA = 0.1
Call = Callable[[], tuple[Tensor, ...]]


class Rows(NamedTuple):
    """What linear_dpo_loss takes beside hidden states and weight, and the same pairs padded: (S, L), chosen answers first."""

    num_tokens: int
    row_R: Tensor
    target_R: Tensor
    sequence_R: Tensor
    token_SL: Tensor
    label_SL: Tensor


def rows_of(documents: Documents, V: int) -> Rows:
    """Row r predicts target r; the first row of an answer is the last token of its prefix. Tokens are drawn."""
    generator = torch.Generator().manual_seed(0)
    P, longest = len(documents), max(prefix + max(answers) for prefix, answers in documents)
    token_SL = torch.zeros(2 * P, longest, dtype=torch.int64)
    label_SL = torch.full((2 * P, longest), -100)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for p, (prefix, answers) in enumerate(documents):
        first = start + prefix
        for side, length in enumerate(answers):
            tokens = torch.arange(first, first + length)
            row = torch.cat([torch.tensor([start + prefix - 1]), tokens[:-1]])
            target = torch.randint(0, V, (length,), generator=generator)
            parts.append((row, target, torch.full((length,), 2 * p + side)))
            line = side * P + p
            token_SL[line, :prefix] = torch.arange(start, start + prefix)
            token_SL[line, prefix : prefix + length] = tokens
            label_SL[line, prefix - 1 : prefix + length - 1] = target
            first += length
        start = first
    row_R, target_R, sequence_R = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rows(start, row_R, target_R, sequence_R, token_SL, label_SL)


def pairs_with(num_rows: int, num_pairs: int) -> Documents:
    """Equally long pairs, so that Liger has nothing to pad: prefix as long as each answer."""
    length = num_rows // (2 * num_pairs)
    return [(length, [length, length])] * num_pairs


def shapes(device: torch.device, tiny: bool) -> Iterator[tuple[str, Documents, int, int]]:
    """Name, documents, hidden size D, vocabulary columns V."""
    if tiny:
        yield "tiny", pairs_with(32, 2), 16, 300
    elif device.type == "cpu":
        documents = [d for d in preference_documents(16384) if min(d[1]) > 0]
        for count, D, V in ((16, 256, 4096), (16, 1024, 4096), (4, 256, 32000)):
            yield f"{count} pairs of hh-rlhf's lengths", documents[:count], D, V
    else:
        for R in (8192, 2048, 32768):
            yield f"{R} rows", pairs_with(R, R // 512), 4096, 128256
        yield "8192 rows", pairs_with(8192, 16), 3584, 152064
        for ranks in (2, 4, 8):
            shard = f"8192 rows, one of {ranks} tensor-parallel shards"
            yield shard, pairs_with(8192, 16), 4096, 128256 // ranks


def cases(device: torch.device, tiny: bool, backends: Sequence[str]) -> Iterator[Case]:
    for name, documents, D, V in shapes(device, tiny):
        rows = rows_of(documents, V)
        rows = Rows(rows.num_tokens, *(part.to(device) for part in rows[1:]))
        hidden = leaf(device, rows.num_tokens, D, seed=0, scale=3.0 / D**0.5)
        weight = leaf(device, V, D, seed=1)
        R = len(rows.row_R)
        calls: dict[str, Call] = {
            f"{backend}, {plan}": ours(hidden, weight, rows, plan, backend)
            for backend in runnable(backends, device, tiny)
            for plan in ("recompute", "store")
        }
        calls |= peers(hidden, weight, rows, compiled=not tiny)
        providers = {n: Provider(forward=c, inputs=(hidden, weight)) for n, c in calls.items()}
        floor = partial(products, hidden, weight, rows.row_R)
        providers["three products alone"] = Provider(forward=floor, comparable=False)
        size = hidden.element_size()
        yield Case(
            name=f"{name} ({R} rows), hidden {D}, vocabulary {V}",
            providers=providers,
            bytes=(size * (R + V) * D, 2 * size * (R + V) * D),
            flops=(2 * R * D * V, 4 * R * D * V),
            phases=("forward_backward",),
        )


def tuning(device: torch.device, tiny: bool) -> Iterator[Case]:
    """Triton's candidates for the tile of the products, both plans; what wins belongs into _triton_tiles.RULES."""
    from nova_kernels.linear_logprob import _triton
    from nova_kernels.linear_logprob._triton_tiles import CANDIDATES, Tile

    def with_tile(tile: Tile, call: Call) -> Call:
        def tuned() -> tuple[Tensor, ...]:
            with mock.patch.object(_triton, "choose_tile", lambda *_, **__: tile):
                (loss,) = call()
                return (loss, *torch.autograd.grad(loss, inputs))  # the backward chooses a tile too

        return tuned

    for name, documents, D, V in shapes(device, tiny):
        rows = rows_of(documents, V)
        rows = Rows(rows.num_tokens, *(part.to(device) for part in rows[1:]))
        inputs = (
            leaf(device, rows.num_tokens, D, seed=0, scale=3.0 / D**0.5),
            leaf(device, V, D, seed=1),
        )
        R = len(rows.row_R)
        yield Case(
            name=f"{name} ({R} rows), hidden {D}, vocabulary {V}",
            providers={
                f"{plan}, {' '.join(f'{key} {value}' for key, value in tile._asdict().items())}": Provider(
                    forward=with_tile(tile, ours(*inputs, rows, plan, "triton"))
                )
                for plan in ("recompute", "store")
                for tile in CANDIDATES
            },
            bytes=(0, 0),
            flops=(6 * R * D * V, 0),
            phases=("forward",),
        )


def ours(hidden: Tensor, weight: Tensor, rows: Rows, plan: str, backend: str) -> Call:
    ref_logp_S = torch.zeros(len(rows.token_SL), device=hidden.device)

    def call() -> tuple[Tensor, ...]:
        result = linear_dpo_loss(
            *(hidden, weight, rows.row_R, rows.target_R, rows.sequence_R, ref_logp_S),
            beta=BETA,
            plan=plan,
            backend=backend,
        )
        return (result.loss_sum / result.num_pairs,)

    return call


def peers(hidden: Tensor, weight: Tensor, rows: Rows, *, compiled: bool) -> dict[str, Call]:
    """Each takes the same leaves; none of them computes a reference's log-probs."""
    plain = partial(whole_logits, hidden, weight, rows)
    calls: dict[str, Call] = {"torch, whole logits of the rows": plain}
    if compiled:
        calls["torch.compile of that"] = partial(torch.compile(whole_logits), hidden, weight, rows)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError:
        return calls
    for kind in (False, True) if compiled else (False,):
        loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=kind)
        name = "Liger's DPO loss, compiled" if kind else "Liger's DPO loss"
        calls[name] = partial(liger_dpo, loss, hidden, weight, rows)
    if hidden.is_cuda:
        calls["Liger's linear cross-entropy"] = partial(liger_nll, hidden, weight, rows)
    return calls


def whole_logits(hidden: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    """As a user would write it in torch, on the response rows alone."""
    logits = (hidden[rows.row_R] @ weight.T).float()
    logp_R = -F.cross_entropy(logits, rows.target_R, reduction="none")
    logp_S = logp_R.new_zeros(len(rows.token_SL)).index_add(0, rows.sequence_R, logp_R)
    return (-F.logsigmoid(BETA * (logp_S[0::2] - logp_S[1::2])).mean(),)


def liger_dpo(loss: Any, hidden: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    return (loss(weight, hidden[rows.token_SL], rows.label_SL)[0],)


def liger_nll(hidden: Tensor, weight: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    """Not a preference loss: what its fastest fused output layer takes for the same rows."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    result: Any = LigerFusedLinearCrossEntropyFunction.apply(
        hidden[rows.row_R], weight, rows.target_R
    )
    return (result[0] if isinstance(result, tuple) else result,)


def products(hidden: Tensor, weight: Tensor, row_R: Tensor) -> tuple[Tensor, ...]:
    """The floor: the three products that no implementation can do without, and nothing else."""
    with torch.no_grad():
        x_RD = hidden[row_R]
        z_RV = x_RD @ weight.T
        return z_RV @ weight, z_RV.T @ x_RD
