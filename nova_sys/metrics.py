"""Throughput, memory, model-FLOPs utilisation (`flops.py`) and GPU figures (`nvml.py`) of a step; the scalars of KV shifting."""

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
from nova_sys.flops import training_flops
from nova_sys.nvml import MAXIMA, GpuMonitor, gpu_uuid
from nova_sys.parallel import Parallel

# Dense bf16 peak per device, TFLOP/s, from NVIDIA's data sheets (without sparsity). Whole names: PCIe and NVL variants, and slices by MIG,
# have other peaks.
PEAK_BF16_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H800": 989.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
}
GPU_MEANS = ("power_w", "utilization_percent", "sm_clock_mhz", "memory_clock_mhz", "draw_w")
"""What a rank knows of its GPU, to be averaged over the job."""
KV_SHIFT_TAGS = {
    "k_mix_K2": ("kv_shift/k_previous", "kv_shift/k_current"),
    "v_mix_K2": ("kv_shift/v_previous", "kv_shift/v_current"),
}
"""Parameter -> TensorBoard tags of its two columns."""


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of: the data sheet's dense bf16 peak of a known GPU, else a square GEMM measured here in the run's
    dtype, with the threads that this rank has."""
    if device.type == "cuda":
        tflops = PEAK_BF16_TFLOPS.get(torch.cuda.get_device_name(device))
        if tflops is not None:
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
    """Turns a step's packs and seconds into the record's throughput, memory and GPU fields, of the whole job. Until `close()`."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: Parallel,
        *,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.vocab_size, self.parallel = model, vocab_size, parallel
        self.peak_flops = peak_flops(parallel.device, dtype)
        self.gpu = GpuMonitor(gpu_uuid(parallel.device))

    def close(self) -> None:
        self.gpu.close()

    def record(
        self, packs: Sequence[Pack], step_time_s: float, data_wait_s: float
    ) -> dict[str, float]:
        """Collectives: one sum and one maximum over all ranks."""
        gpu, parallel = self.gpu.since_last(), self.parallel
        local = [
            float(sum(p.num_tokens for p in packs)),
            float(sum(len(p.tokens_T) for p in packs)),
            float(sum(len(p.document_P) for p in packs)),
            sum(training_flops(self.model, self.vocab_size, p) for p in packs),
        ]
        local += [gpu.get(name, 0.0) for name in GPU_MEANS]
        local += [float(name in gpu) for name in GPU_MEANS]
        sums = torch.tensor(local, dtype=torch.float64, device=parallel.device)
        dist.all_reduce(
            sums
        )  # now of all ranks, so of all GPUs, and `copies` times the global batch's
        values = sums.tolist()
        copies = parallel.world_size // parallel.data_size
        tokens, slots, documents, flops = (value / copies for value in values[:4])
        largest = torch.tensor(
            [
                peak_memory_gib(parallel.device),
                data_wait_s,
                *(gpu.get(name, -math.inf) for name in MAXIMA),
            ],
            dtype=torch.float64,
            device=parallel.device,
        )
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)  # now the largest of any rank
        peak_gib, wait_s, *maxima = largest.tolist()
        world = parallel.world_size
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
        return record | _gpu_fields(values[4:], maxima, record["tokens_per_s"], world)


def _gpu_fields(
    sums: list[float], maxima: list[float], tokens_per_s: float, world_size: int
) -> dict[str, float]:
    """Means over the GPUs that told a value, maxima, and the job's energy per token, if all of its GPUs told their power.

    sums: of GPU_MEANS over the job, then from how many GPUs each came.
    """
    totals, counts = sums[: len(GPU_MEANS)], sums[len(GPU_MEANS) :]
    told = {name: (x, n) for name, x, n in zip(GPU_MEANS, totals, counts, strict=True) if n}
    fields = {f"gpu_{name}": x / n for name, (x, n) in told.items()}
    if fields.pop("gpu_draw_w", None) is not None:
        draw_w, num_gpus = told["draw_w"]
        if num_gpus == world_size and tokens_per_s > 0:
            fields["gpu_energy_mj_per_token"] = 1e3 * draw_w / tokens_per_s
    for name, value in zip(MAXIMA, maxima, strict=True):
        if value > -math.inf:
            fields[f"gpu_{name}"] = value
    return fields


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
