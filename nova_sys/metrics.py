"""Throughput, memory and model-FLOPs utilisation of a step; the scalars of KV shifting.

FLOPs are what the packs needed, not what ran: padding, recomputation and masked attention tiles do not count. A multiply-add is two
FLOPs; the backward pass costs twice the forward.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from nova_sys.config import ModelConfig, RunConfig
from nova_sys.data.batch import Pack
from nova_sys.parallel import Parallel

# Dense bf16 peak per device, TFLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_BF16_TFLOPS = {"H100 80GB HBM3": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0}
KV_SHIFT_TAGS = {
    "k_mix_K2": ("kv_shift/k_previous", "kv_shift/k_current"),
    "v_mix_K2": ("kv_shift/v_previous", "kv_shift/v_current"),
}
"""Parameter -> TensorBoard tags of its two columns."""


def attention_area(segments_S4: np.ndarray) -> int:
    """Allowed (query, key) pairs of a pack: causal within each segment, plus every branch token against its prefix."""
    start, end, prefix_start, prefix_end = segments_S4.astype(np.int64).T
    length = end - start
    return int((length * (length + 1) // 2 + length * (prefix_end - prefix_start)).sum())


def training_flops(model: ModelConfig, head_dim: int, vocab_size: int, pack: Pack) -> float:
    """Forward and backward FLOPs of one pack: projections on its tokens, attention on its area, the head on its response rows."""
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.hidden_size
    projections = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * model.ffn_hidden_size
    area = attention_area(pack.segments_S4[pack.segments_S4[:, 0] < pack.num_tokens])
    forward = 2.0 * model.num_layers * (projections * pack.num_tokens + 2 * heads * head_dim * area)
    forward += 2.0 * width * vocab_size * len(pack.row_R)
    return 3.0 * forward


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of: the data sheet's dense bf16 peak of a known GPU, else a square GEMM measured here in the run's
    dtype, with the threads that this rank has."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_BF16_TFLOPS.items():
            if known in name:
                return 1e12 * tflops
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best_s = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * size**3 / best_s


class StepClock:
    """Turns a step's packs and seconds into the record's throughput fields: sums over the data-parallel ranks, and the largest peak
    memory and wait for data of any rank."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: Parallel,
        *,
        head_dim: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.parallel = model, parallel
        self.head_dim, self.vocab_size = head_dim, vocab_size
        self.peak_flops = peak_flops(parallel.device, dtype)

    def record(
        self, packs: Sequence[Pack], step_time_s: float, data_wait_s: float
    ) -> dict[str, float]:
        local = [
            float(sum(p.num_tokens for p in packs)),
            float(sum(len(p.tokens_T) for p in packs)),
            float(sum(len(p.document_P) for p in packs)),
            sum(training_flops(self.model, self.head_dim, self.vocab_size, p) for p in packs),
        ]
        sums = torch.tensor(local, dtype=torch.float64, device=self.parallel.device)
        dist.all_reduce(
            sums, group=self.parallel.groups.dp
        )  # now the global batch's, on every rank
        tokens, slots, documents, flops = sums.tolist()
        largest = torch.tensor(
            [peak_memory_gib(self.parallel.device), data_wait_s],
            dtype=torch.float64,
            device=self.parallel.device,
        )
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)  # now the largest of any rank
        peak_gib, wait_s = largest.tolist()
        world = self.parallel.world_size
        record = {
            "tokens_per_s": tokens / step_time_s,
            "tokens_per_s_per_gpu": tokens / step_time_s / world,
            "pairs_per_s": documents / step_time_s,
            "step_time_s": step_time_s,
            "data_wait_ms": 1e3 * wait_s,  # every rank waits for the last one
            "fill": tokens / slots,
            "peak_gib": peak_gib,
        }
        record["mfu"] = flops / step_time_s / world / self.peak_flops
        return record


def kv_shift_histograms(
    chunks: Sequence[torch.nn.Module], config: RunConfig, parallel: Parallel, step: int
) -> dict[str, np.ndarray]:
    """The scalars of KV shifting by TensorBoard tag, over all layers and KV heads of the model, every `log.every_steps` steps; else
    nothing. Called on every rank; the same on all of them.

    Collectives: one all-gather of this rank's scalars (4 per layer and KV head, fp32) over the ranks that share the model.
    """
    log = config.log
    if not (config.model.kv_shift and log.tensorboard) or step % log.every_steps:
        return {}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in KV_SHIFT_TAGS}
    for chunk in chunks:
        for path, weight in chunk.named_parameters():
            name = path.rpartition(".")[2]
            if name in found:
                found[name].append(weight.detach().float())
    ours = torch.stack([torch.cat(weights) for weights in found.values()])  # (k or v, heads, 2)
    group = parallel.groups.mp
    everywhere = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, ours, group=group)  # now every layer's and every head's
    joined = torch.cat(everywhere, dim=1).cpu().numpy()
    return {
        tag: joined[i, :, column]
        for i, tags in enumerate(KV_SHIFT_TAGS.values())
        for column, tag in enumerate(tags)
    }
