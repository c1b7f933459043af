"""The CUDA kernels of packed_attention in the emulator, with the interface of nova_kernels._C_cuda."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.kernels.emulation import Mutation, emulated


class AttentionShape(ctypes.Structure):
    """csrc/cuda/packed_attention/work.h"""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("tokens", "heads", "kv_heads", "head_dim", "pack_shift", "row_stride")
    ]
    forward_tokens: int
    dq_tokens: int
    key_tokens: int

    @property
    def packs(self) -> int:
        return self.heads >> self.pack_shift


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class Call(ctypes.Structure):
    """tests/kernels/emulator/packed_attention.cpp"""

    _fields_ = [
        ("shape", AttentionShape),
        ("grid", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("query_tiles", ctypes.c_void_p),
        ("key_tiles", ctypes.c_void_p),
        ("num_query_tiles", ctypes.c_int),
        ("num_key_tiles", ctypes.c_int),
        *[(name, Rows) for name in ("q", "k", "v", "d_out")],
        *[
            (name, ctypes.c_void_p)
            for name in ("out", "dq", "dk", "dv", "lse2", "delta", "partials")
        ],
        ("parts", ctypes.c_int),
    ]


@dataclass(frozen=True)
class EmulatedKernels:
    """grid: thread blocks at most; seed: in which order they and their asynchronous work run."""

    grid: int = 2
    seed: int = 0
    mutations: Sequence[Mutation] = ()
    parts: int = 1  # of a dK/dV item, which _C_cuda chooses by the number of items

    @property
    def library(self) -> ctypes.CDLL:
        return emulated("packed_attention", tuple(self.mutations))

    def AttentionShape(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int
    ) -> AttentionShape:
        shape = AttentionShape()
        self.library.attention_shape(tokens, heads, kv_heads, head_dim, ctypes.byref(shape))
        shape.forward_tokens = self.library.attention_forward_tokens(ctypes.byref(shape))
        shape.dq_tokens = self.library.attention_dq_tokens(ctypes.byref(shape))
        shape.key_tokens = self.library.attention_key_tokens()
        return shape

    def attention_key_parts(self, tiles: int, kv_heads: int) -> int:
        return self.parts

    def attention_forward(
        self,
        shape: AttentionShape,
        *,
        q: tuple[int, int],
        k: tuple[int, int],
        v: tuple[int, int],
        query_tiles: tuple[int, int],
        out: int,
        lse2: int,
        softmax_scale: float,
        blocks: int,
        stream: int,
    ) -> None:
        call = self._call(shape, softmax_scale)
        call.q, call.k, call.v = Rows(*q), Rows(*k), Rows(*v)
        call.query_tiles, call.num_query_tiles = query_tiles
        call.out, call.lse2 = out, lse2
        self._run("emulate_forward", call)

    def attention_backward(
        self,
        shape: AttentionShape,
        *,
        q: tuple[int, int],
        k: tuple[int, int],
        v: tuple[int, int],
        d_out: tuple[int, int],
        query_tiles: tuple[int, int],
        key_tiles: tuple[int, int],
        out: int,
        lse2_and_delta: tuple[int, int],
        dq_dk_dv: tuple[int, int, int],
        partials: int,
        softmax_scale: float,
        blocks: int,
        stream: int,
    ) -> None:
        call = self._call(shape, softmax_scale)
        call.q, call.k, call.v, call.d_out = Rows(*q), Rows(*k), Rows(*v), Rows(*d_out)
        call.query_tiles, call.num_query_tiles = query_tiles
        call.key_tiles, call.num_key_tiles = key_tiles
        call.out, (call.lse2, call.delta) = out, lse2_and_delta
        call.dq, call.dk, call.dv = dq_dk_dv
        call.partials, call.parts = partials, self.parts
        self._run("emulate_backward", call)

    def _call(self, shape: AttentionShape, softmax_scale: float) -> Call:
        log2e = 1 / math.log(2)
        return Call(shape, self.grid, self.seed, softmax_scale, softmax_scale * log2e)

    def _run(self, function: str, call: Call) -> None:
        message = ctypes.create_string_buffer(400)
        getattr(self.library, function)(ctypes.byref(call), message, len(message))
        if message.value:
            raise RuntimeError(message.value.decode())
