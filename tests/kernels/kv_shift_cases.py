"""What the tests of kv_shift_rope's options share: the token-by-token definition, inputs by name, gradients of all of them."""

import pytest
import torch

from nova_kernels import kv_shift_rope
from nova_kernels.backend import triton_runs_on
from nova_kernels.segments import positions, previous_token
from nova_kernels.testing import seeded_normal

on_cpu = pytest.mark.skipif(
    not triton_runs_on(torch.device("cpu")), reason="Triton is not installed, or a GPU runs it"
)
BACKENDS = ["reference", pytest.param("triton", marks=on_cpu)]
NAMES = ("q", "k", "v", "k_mix", "v_mix", "q_norm", "k_norm")
EPS = 1e-3  # large enough to be seen


def by_definition(args, segments, tables, interleaved=False):
    """Norm, then shift, then RoPE as a complex product; differentiable, in the input's dtype."""
    q, k, v, k_mix, v_mix, q_norm, k_norm = (args.get(name) for name in NAMES)
    cos_PF, sin_PF = tables
    T, F = len(q), cos_PF.shape[1]
    position, previous = positions(segments, T).tolist(), previous_token(segments, T).tolist()

    def norm(x, weight):
        return x if weight is None else torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)

    def shift(x, mix):
        if mix is None:
            return x
        before = [x[p] if p >= 0 else torch.zeros_like(x[0]) for p in previous]
        return mix[:, 1:] * x + mix[:, :1] * torch.stack(before)

    def rotate(x):
        turn, passed = x[..., : 2 * F], x[..., 2 * F :]
        pairs = turn.unflatten(-1, (F, 2)) if interleaved else turn.unflatten(-1, (2, F)).mT
        factor = torch.complex(cos_PF[position].to(x.dtype), sin_PF[position].to(x.dtype))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor[:, None])
        return torch.cat(((turned if interleaved else turned.mT).flatten(-2), passed), -1)

    return rotate(norm(q, q_norm)), rotate(shift(norm(k, k_norm), k_mix)), shift(v, v_mix)


def call(args, segments, tables, **options):
    given = [args.get(name) for name in NAMES]
    return kv_shift_rope(
        *given[:3], segments, *given[3:5], *tables,
        q_norm_H=given[5], k_norm_H=given[6], norm_eps=EPS, **options,
    )  # fmt: skip


def inputs(T, N=4, K=2, H=8, dtype=torch.float64, absent=()):
    """Tensors with gradient by name, and upstream gradients of q, k, v."""
    shapes = ((T, N, H), (T, K, H), (T, K, H), (K, 2), (K, 2), (H,), (H,))
    args = {
        name: seeded_normal(*shape, seed=i, dtype=dtype).requires_grad_()
        for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
        if name not in absent
    }
    return args, [seeded_normal(*s, seed=9 + i, dtype=dtype) for i, s in enumerate(shapes[:3])]


def gradients(outputs, args, upstream):
    wanted = [x for x in args.values() if x.requires_grad]
    found = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
    assert all(dx is not None for dx in found)
    return list(found)


def results(op, args, upstream, *rest, **options):
    out = op(args, *rest, **options)
    return [*out, *gradients(out, args, upstream)]


def wide(args):
    return {name: x.detach().double().requires_grad_() for name, x in args.items()}
