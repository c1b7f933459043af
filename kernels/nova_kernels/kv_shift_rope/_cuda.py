"""KV shifting and packed RoPE on a Hopper GPU: launches and autograd around csrc/cuda/kv_shift_rope.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, F rotary_dim / 2, B blocks of tokens. X stands for N or K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nova_kernels.backend import cuda_kernels
from nova_kernels.kv_shift_rope.state import Options, Weights
from nova_kernels.ranges import ranged
from nova_kernels.segments import SegmentIndex

BLOCKS = 0  # thread blocks of a launch at most, 0: as many as there is work for. No result depends on it.


def broken_rule(q_TNH: torch.Tensor, cos_PF: torch.Tensor, weights: Weights) -> str:
    """The rule of the CUDA kernels that these inputs break, or an empty string; their device aside."""
    H, F = q_TNH.shape[2], cos_PF.shape[1]
    if q_TNH.dtype != torch.bfloat16:
        return f"cuda needs bf16, not {str(q_TNH.dtype).removeprefix('torch.')}"
    if H % 16 or not 16 <= H <= 256:
        return f"cuda needs a head dim that is a multiple of 16 up to 256, not {H}"
    if F % 8 or F == 0:
        return f"cuda needs rotary dims that are a multiple of 16, not {2 * F}"
    if weights.q_norm_H is not None or weights.k_norm_H is not None:
        return "cuda has no norms; triton has"
    return ""


def kv_shift_rope_cuda(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    weights: Weights,
    tables: tuple[torch.Tensor, torch.Tensor],
    index: SegmentIndex,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The public function's work; arguments are checked, and break no rule of `broken_rule`. tables: cos, sin (P, F)."""
    mixes = (weights.k_mix_K2, weights.v_mix_K2)
    q, k, v = _ShiftRope.apply(q_TNH, k_TKH, v_TKH, *mixes, *tables, index, options)
    return q, k, v_TKH if weights.v_mix_K2 is None else v


class _ShiftRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        k_mix_K2: torch.Tensor | None,
        v_mix_K2: torch.Tensor | None,
        cos_PF: torch.Tensor,
        sin_PF: torch.Tensor,
        index: SegmentIndex,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        q, k, v = (_loadable(x) for x in (q_TNH, k_TKH, v_TKH))
        if options.inplace_q and q is not q_TNH:
            raise ValueError(
                f"inplace_q: cuda writes 16 bytes at a time, and q_TNH (strides {tuple(q_TNH.stride())}, in elements) does not lie on such "
                "places. Leave inplace_q off, or align q_TNH."
            )
        tables = (_fp32(cos_PF), _fp32(sin_PF))
        q_out = q_TNH if options.inplace_q else _empty(q)
        k_out, v_out = _empty(k), None if v_mix_K2 is None else _empty(v)
        parts = [(q, q_out, None, True), (k, k_out, _fp32(k_mix_K2), True)]
        if v_out is not None:
            parts.append((v, v_out, _fp32(v_mix_K2), False))
        _shift(parts, tables, index, options, sign=1.0)
        if options.inplace_q:
            ctx.mark_dirty(q_TNH)
        raw = [x if mix is not None else None for x, mix in ((k, k_mix_K2), (v, v_mix_K2))]
        ctx.save_for_backward(*raw, k_mix_K2, v_mix_K2, *tables)
        ctx.index, ctx.options = index, options
        return q_out, k_out, v_out

    @staticmethod
    @once_differentiable
    @ranged("nova_kernels.kv_shift_rope.backward")
    def backward(
        ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor, dv_out: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        k, v, k_mix_K2, v_mix_K2, *tables = ctx.saved_tensors
        cos_sin, index, options = (tables[0], tables[1]), ctx.index, ctx.options
        turned = [_loadable(dq_out)]
        if k is None:
            turned.append(_loadable(dk_out))
        grads = [_empty(x) for x in turned]
        _shift(
            [(x, dx, None, True) for x, dx in zip(turned, grads, strict=True)],
            cos_sin, index, options, sign=-1.0,
        )  # fmt: skip
        dk, dk_mix = (grads[-1], None) if k is None else _unmix(dk_out, k, k_mix_K2, True, cos_sin, index, options)  # fmt: skip
        dv = dv_mix = None
        if v is not None and dv_out is not None:
            dv, dv_mix = _unmix(dv_out, v, v_mix_K2, False, cos_sin, index, options)
        return grads[0], dk, dv, dk_mix, dv_mix, None, None, None, None


Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]
"""In, out, fp32 mix, whether positions turn it."""


def _shift(
    parts: list[Part],
    tables: tuple[torch.Tensor, torch.Tensor],
    index: SegmentIndex,
    options: Options,
    *,
    sign: float,
) -> None:
    tokens, _, head_dim = parts[0][0].shape
    if tokens == 0:
        return
    kernels: Any = cuda_kernels()
    listed = [
        (_view(x), _view(out), x.shape[1], 0 if mix is None else mix.data_ptr(), turns)
        for x, out, mix, turns in parts
    ]
    with torch.cuda.device_of(parts[0][0]):
        kernels.shift_rope(
            listed,
            position_T=index.position_T.data_ptr(),
            previous_T=index.previous_T.data_ptr(),
            tables=_tables(tables, options),
            tokens=tokens,
            head_dim=head_dim,
            sign=sign,
            blocks=BLOCKS,
            stream=_stream(parts[0][0]),
        )


def _unmix(
    dy: torch.Tensor,
    x: torch.Tensor,
    mix_X2: torch.Tensor,
    turns: bool,
    tables: tuple[torch.Tensor, torch.Tensor],
    index: SegmentIndex,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and the gradient of the mix in its dtype."""
    kernels: Any = cuda_kernels()
    dy, dx, mix = _loadable(dy), _empty(dy), _fp32(mix_X2)
    tokens, heads, head_dim = x.shape
    partial_BX2 = torch.empty(
        kernels.unmix_blocks(tokens), heads, 2, dtype=torch.float32, device=x.device
    )
    offset_T1, tokens_J = index.successors
    if tokens:
        with torch.cuda.device_of(x):
            kernels.unmix(
                dy=_view(dy), x=_view(x), dx=_view(dx), heads=heads, mix_X2=mix.data_ptr(),
                partial_BX2=partial_BX2.data_ptr(), turns=turns, position_T=index.position_T.data_ptr(),
                previous_T=index.previous_T.data_ptr(), offset_T1_and_tokens_J=(offset_T1.data_ptr(), tokens_J.data_ptr()),
                tables=_tables(tables, options), tokens=tokens, head_dim=head_dim, stream=_stream(x),
            )  # fmt: skip
    return dx, partial_BX2.sum(0).to(mix_X2.dtype)


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """x if 16-byte loads can read its rows, else a copy."""
    aligned = not (x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8)
    # Not .contiguous(), which returns what is contiguous in a wrong place, and ignores strides of single rows.
    fits = aligned and x.stride(2) == 1
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _fp32(x: Any) -> Any:
    return None if x is None else x.float().contiguous()


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _view(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _tables(
    tables: tuple[torch.Tensor, torch.Tensor], options: Options
) -> tuple[int, int, int, bool]:
    cos, sin = tables
    return cos.data_ptr(), sin.data_ptr(), cos.shape[1], options.interleaved


def _stream(x: torch.Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
