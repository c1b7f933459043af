"""Argument errors shared by every public function: the value seen, the rule, what to change."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str | None, ...]) -> None:
    """Raises unless `tensor` has the expected dims: an int must match; a str or None is free."""
    fits = tensor.dim() == len(expected) and all(
        seen == rule
        for seen, rule in zip(tensor.shape, expected, strict=True)
        if isinstance(rule, int)
    )
    if not fits:
        rule = ", ".join("?" if dim is None else str(dim) for dim in expected)
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but must be ({rule}). "
            f"Reshape {name}, or pass the tensors that belong together."
        )


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raises unless `tensor.dtype` is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " | ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, but must be {names}. "
            f"Convert it with {name}.to(torch.{str(allowed[0]).removeprefix('torch.')})."
        )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raises unless all the named tensors (None is skipped) live on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        seen = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(
            f"the arguments are on different devices ({seen}), but must share one. "
            f"Move them with .to(device)."
        )
