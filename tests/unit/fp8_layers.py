"""Stand-ins for Transformer Engine's layers on a CPU: its parameter names, its way to keep scales, and real FP8 rounding of both operands.

What they cannot show: whether its kernels compute that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from torch.utils.checkpoint import checkpoint

from nova_sys.model import te

E4M3_MAX = 448.0


class Engine:
    """What Transformer Engine keeps per process. recipe: of the context that is open; None: layers run unrounded."""

    recipe: str | None = None
    layers: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @classmethod
    def update_scales(cls, *, forward: bool) -> None:
        """Of all layers that have run, whichever model they belong to."""
        for layer in cls.layers:
            scale, history = layer.fp8_meta["scaling_fwd" if forward else "scaling_bwd"]
            amax = history.amax(0)
            scale.copy_(torch.where(amax > 0, E4M3_MAX / amax, scale))
            history.copy_(history.roll(-1, 0))
            history[0] = 0

    @classmethod
    @contextmanager
    def context(cls, config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
        if not config.fp8 or is_init or is_first_last_bf16_layer(config, layer_no):
            yield
            return
        cls.recipe = config.fp8_recipe
        try:
            yield
        finally:
            cls.recipe = None
        if config.fp8_recipe == "delayed" and torch.is_grad_enabled():
            cls.update_scales(forward=True)


def rounded(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    wide = (x.float() * scale).clamp(-E4M3_MAX, E4M3_MAX)
    return (wide.to(torch.float8_e4m3fn).float() / scale).to(x.dtype)


class KeptInFp8(torch.nn.Parameter):
    """A weight that holds FP8 numbers: what is written into it is rounded."""

    _high_precision_init_val: torch.Tensor | None = None

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return super().copy_(rounded(other, 1.0))

    def dequantize(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor).clone()

    def get_high_precision_init_val(self) -> torch.Tensor | None:
        return self._high_precision_init_val


class _Layer:
    """The part of both layers; a mixin, so that names and shards are those of Megatron's own."""

    weight: torch.Tensor
    is_first_microbatch = True
    fuse_wgrad_accumulation = False

    def start(self, config: Any) -> None:
        self.fp8_meta: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.history_length = config.fp8_amax_history_len
        self.cached: torch.Tensor | None = None
        if config.fp8_param:
            self.weight = KeptInFp8(self.weight.detach())

    def init_fp8_metadata(self) -> None:
        for key, num_tensors in ({} if self.fp8_meta else {"scaling_fwd": 3, "scaling_bwd": 2}).items():  # fmt: skip
            history = torch.zeros(self.history_length, num_tensors)
            self.fp8_meta[key] = (torch.ones(num_tensors), history)

    def get_fp8_meta_tensors(self) -> dict[str, list[torch.Tensor]]:
        return {key: [t.clone() for t in tensors] for key, tensors in self.fp8_meta.items()}

    def reset_fp8_meta_tensors(self, kept: dict[str, list[torch.Tensor]]) -> None:
        for key, tensors in self.fp8_meta.items():
            for tensor, value in zip(tensors, kept[key], strict=True):
                tensor.copy_(value)

    def _scale(self, x: torch.Tensor, index: int) -> torch.Tensor:
        amax = x.detach().float().abs()
        if Engine.recipe == "delayed":
            self.init_fp8_metadata()
            Engine.layers.add(self)
            scale, history = self.fp8_meta["scaling_fwd"]
            history[0, index] = torch.maximum(history[0, index], amax.max())
            return scale[index].clone()
        per_token = Engine.recipe == "blockwise" and index == 0
        amax = amax.amax(-1, keepdim=True) if per_token else amax.max()
        return E4M3_MAX / amax.clamp(min=1e-12)

    def product(self, x_SBD: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if Engine.recipe:
            with torch.no_grad():
                x_rounded = rounded(x_SBD, self._scale(x_SBD, 0))
                if self.is_first_microbatch or self.cached is None:
                    self.cached = rounded(weight, self._scale(weight, 1))
            self.is_first_microbatch = False
            x_SBD = x_SBD + (x_rounded - x_SBD).detach()
            weight = weight + (self.cached - weight).detach()
        return torch.nn.functional.linear(x_SBD, weight)


class LayerNormColumn(_Layer, ColumnParallelLinear):
    def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)  # pyright: ignore[reportCallIssue]
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))  # fmt: skip
        self.eps = config.layernorm_epsilon
        self.start(config)

    def forward(self, x_SBD: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        norm = self.layer_norm_weight
        normed_SBD = torch.nn.functional.rms_norm(x_SBD, norm.shape, norm, self.eps)
        out_SBD = self.product(normed_SBD)
        return (out_SBD if self.bias is None else out_SBD + self.bias), None


class Row(_Layer, RowParallelLinear):
    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)  # pyright: ignore[reportCallIssue]
        self.start(config)

    def forward(self, x_SBD: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.product(x_SBD), None


def recomputed(forward: Any, *args: Any) -> Any:
    """te_checkpoint's part here: (distribute_saved_activations, get_rng_state_tracker, tp_group) come before the layers' inputs."""
    return checkpoint(forward, *args[3:], use_reentrant=False, preserve_rng_state=False)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins where Megatron has Transformer Engine's layers."""
    manager = SimpleNamespace(reduce_and_update_fp8_tensors=Engine.update_scales)
    monkeypatch.setattr(extension, "TELayerNormColumnParallelLinear", LayerNormColumn)
    monkeypatch.setattr(extension, "TERowParallelLinear", Row)
    monkeypatch.setattr(extension, "FP8GlobalStateManager", manager, raising=False)
    monkeypatch.setattr(transformer_block, "get_fp8_context", Engine.context)
    monkeypatch.setattr(transformer_block, "te_checkpoint", recomputed, raising=False)
    monkeypatch.setattr(te, "get_fp8_context", Engine.context)
    monkeypatch.setattr(Engine, "layers", weakref.WeakSet())
