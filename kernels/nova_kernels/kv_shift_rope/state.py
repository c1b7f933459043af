"""What every backend of kv_shift_rope is handed, and the rules of writing q in place.

Legend: T packed tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Weights(NamedTuple):
    """The learned tensors; None: that part is left out. A backend's gradients come in this order."""

    k_mix_K2: torch.Tensor | None
    v_mix_K2: torch.Tensor | None
    q_norm_H: torch.Tensor | None
    k_norm_H: torch.Tensor | None


class Options(NamedTuple):
    interleaved: bool
    norm_eps: float
    inplace_q: bool


def check_inplace(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, q_norm_H: torch.Tensor | None
) -> None:
    """Raises: ValueError when the turned q cannot stand where q stands: for its memory's sake, or for autograd's."""
    fresh = "Leave inplace_q off"
    if q_TNH.stride(-1) != 1 or not _is_dense(q_TNH):
        raise ValueError(
            f"inplace_q: q_TNH has strides {tuple(q_TNH.stride())}, but every element needs a place of its own and a head's dims "
            f"must lie side by side. {fresh}, or pass q_TNH.contiguous()."
        )
    for name, other in (("k_TKH", k_TKH), ("v_TKH", v_TKH)):
        if _may_share(q_TNH, other):
            raise ValueError(
                f"inplace_q: q_TNH and {name} may share memory, and {name} is read while q is written. {fresh}, or pass copies."
            )
    if not torch.is_grad_enabled():
        return
    if q_TNH.requires_grad and q_TNH.is_leaf:
        raise ValueError(
            f"inplace_q: q_TNH is a leaf that requires a gradient, and its value would be lost. {fresh}, or pass q_TNH.clone()."
        )
    if q_TNH.requires_grad and q_TNH._is_view():
        raise ValueError(
            "inplace_q: q_TNH is a view of a tensor that requires a gradient (a slice of a fused projection?), and autograd follows "
            f"a write into a view for ops with one output only. {fresh}, or pass a q that is no view, such as reshape makes when it copies."
        )
    if q_norm_H is not None and (q_TNH.requires_grad or q_norm_H.requires_grad):
        raise ValueError(
            "inplace_q: with q_norm_H the gradient takes q as it was before the normalisation, and that would be overwritten. "
            f"{fresh}; without a gradient (torch.no_grad) the two go together."
        )


def _is_dense(x: torch.Tensor) -> bool:
    """No element lies where another does, as in slices and transposes of a dense tensor."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent = max(extent, stride * (size - 1) + extent)
    return True


def _may_share(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a place of x may be one of y; False for slices of one fused projection, by token or by head."""
    if 0 in (x.numel(), y.numel()):
        return False
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    between = y.storage_offset() - x.storage_offset()  # from x's rows to y's, at each level
    for dim, step in enumerate(x.stride()):
        if between >= _extent(x, dim) or -between >= _extent(y, dim):
            return False
        if step <= 0 or step != y.stride(dim):
            return True
        between %= step
        if _extent(x, dim + 1) > step or between + _extent(y, dim + 1) > step:
            return True  # rows that reach into the next one
    return True


def _extent(x: torch.Tensor, dim: int) -> int:
    """Places from the first to the last element of x[0, ..., 0], whose first dim is `dim`."""
    pairs: Iterable[tuple[int, int]] = zip(x.shape[dim:], x.stride()[dim:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)
