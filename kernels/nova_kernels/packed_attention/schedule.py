"""The tile lists of a pack, which the Triton and the CUDA kernels loop over (csrc/host/attention_tiles.h)."""

from __future__ import annotations

import numpy as np
import torch

from nova_kernels.backend import cuda_kernels
from nova_kernels.segments import SegmentIndex


def attention_schedule(
    index: SegmentIndex, query_tokens: int, key_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key tiles (n, 5) int32 on the index's device; made once per pack and tile size, then kept.

    Built on the host in C++ and copied without waiting for the device.
    """
    key = (query_tokens, key_tokens)
    if key not in index.attention_tiles:
        from nova_kernels import _C  # the reference needs no extension

        segments = np.array(index.host_segments, dtype=np.int32).reshape(-1, 4)
        device = index.position_T.device
        index.attention_tiles[key] = tuple(
            _to_device(torch.from_numpy(tiles), device)
            for tiles in _C.attention_tiles(segments, query_tokens, key_tokens)
        )
    return index.attention_tiles[key]


def tile_sizes(N: int, K: int, H: int, backend: str) -> list[tuple[int, int]]:
    """What `attention_schedule` takes beside a pack's index, for the lists that a forward and a backward with N query and K
    key/value heads of H dims loop over: where packs are built, the lists can be, too. None for the reference, and for "auto", which
    is the reference so far."""
    from nova_kernels.packed_attention import MAX_FUSED_HEAD_DIM, _cuda  # which import this file

    if backend == "triton" and H <= MAX_FUSED_HEAD_DIM:
        from nova_kernels.packed_attention._triton import tile_sizes as of_triton  # needs triton

        return of_triton(N, K, H)
    kernels = cuda_kernels()
    if backend != "cuda" or kernels is None or H not in _cuda.HEAD_DIMS:  # the op will say so
        return []
    shape = kernels.AttentionShape(1, N, K, H)
    return [(tokens, shape.key_tokens) for tokens in (shape.forward_tokens, shape.dq_tokens)]


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def loadable(x_TXH: torch.Tensor) -> torch.Tensor:
    """What a tensor map (TMA) can address: heads side by side, rows apart, all on 16 bytes; else a copy."""
    _, X, H = x_TXH.shape
    side_by_side = x_TXH.stride()[1:] == (H, 1) and x_TXH.stride(0) >= X * H
    on_16_bytes = [x_TXH.data_ptr(), *(n * x_TXH.element_size() for n in x_TXH.stride()[:2])]
    fits = side_by_side and all(n % 16 == 0 for n in on_16_bytes)
    # Not .contiguous(), which returns what is contiguous in a wrong place, and ignores strides of single rows.
    return x_TXH if fits else x_TXH.clone(memory_format=torch.contiguous_format)
