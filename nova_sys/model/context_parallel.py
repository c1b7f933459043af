"""Ulysses sequence parallelism (arXiv 2309.14509): long packs over a context-parallel group, whole heads in the attention.

Outside the attention each rank holds a stretch of T/cp tokens. In front of it an all-to-all gives each rank all T tokens of N/cp heads, behind it
another one gives the tokens back, so shifts, rotary positions and attention see the pack as one rank would, with the same kernels. A rank's
weights then have the gradient of its tokens (and, KV-shift scalars, of its heads); the sum over the group is taken with the data-parallel one.

T packed tokens, R response rows, N heads (of either kind, per tensor-parallel rank), H head dim, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _AllToAll(torch.autograd.Function):
    """(T/cp, N, H) -> (T, N/cp, H) if `to_heads`, else back. Each is the other's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, to_heads: bool
    ) -> torch.Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(x, group, to_heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _exchange(grads[0], ctx.group, not ctx.to_heads), None, None


def _exchange(x: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
    ranks, H = group.size(), x.size(2)
    if to_heads:  # rank r is sent heads r * N/cp ...
        sent = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    else:  # rank r is sent tokens r * T/cp ...
        sent = x.unflatten(0, (ranks, -1)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)  # now from rank r: its tokens, or its heads
    if to_heads:
        return received.reshape(-1, received.size(2), H)
    return received.transpose(0, 1).reshape(received.size(1), -1, H)


def tokens_to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's tokens with all heads (T/cp, N, H) -> all tokens with this rank's heads (T, N/cp, H)."""
    return _AllToAll.apply(x, group, True)  # pyright: ignore[reportReturnType]


def heads_to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All tokens with this rank's heads (T, N/cp, H) -> this rank's tokens with all heads (T/cp, N, H)."""
    return _AllToAll.apply(x, group, False)  # pyright: ignore[reportReturnType]


def stretch(length: int, group: dist.ProcessGroup) -> slice:
    """This rank's part of `length` things, in rank order; the parts differ by one at most."""
    rank, ranks = group.rank(), group.size()
    return slice(length * rank // ranks, length * (rank + 1) // ranks)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, length: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.ours = stretch(length, group)
        whole_R = part.new_zeros(length)
        whole_R[ctx.ours] = part
        dist.all_reduce(whole_R, group=group)  # now every rank's stretch: each value has one owner
        return whole_R

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][ctx.ours], None, None


def joined(part: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Each rank's `stretch` of (R,) values -> all of them, on every rank. What follows must be the same on every rank: a stretch
    gets the gradient that its own rank computed."""
    return _Joined.apply(part, length, group)  # pyright: ignore[reportReturnType]
