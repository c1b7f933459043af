"""One optimizer step, and one forward pass, on Megatron's pipeline schedules. A micro-batch is a pack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from nova_sys.algo.base import Algorithm, sequence_logp
from nova_sys.data.batch import DevicePack, Pack
from nova_sys.parallel import Parallel


@dataclass(frozen=True)
class StepResult:
    """means: per-count means by metric name; count: global pairs or tokens; grad_norm before clipping."""

    means: dict[str, float]
    count: int
    grad_norm: float


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    packs: Sequence[Pack],
    on_output: Callable[[torch.Tensor, DevicePack], tuple[torch.Tensor, torch.Tensor, Any]],
    parallel: Parallel,
    *,
    forward_only: bool,
) -> list[Any]:
    """Runs `packs` through the pipeline (no pipelining, 1F1B or interleaved 1F1B, as the layout asks).

    `on_output(model output, pack)` runs on the last stage and returns (loss sum, count, anything to collect).
    Returns what was collected, in the order of the packs, on last-stage ranks; an empty list elsewhere.
    """

    def forward_step(data: Iterator[Pack], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        pack = next(data).to(parallel.device)
        return chunk(pack), partial(_swap, on_output, pack)

    iterators = [iter(packs) for _ in chunks]
    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(packs),
        seq_length=packs[0].tokens_T.shape[0],
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _swap(on_output: Callable, pack: DevicePack, output: torch.Tensor) -> tuple:
    return on_output(output, pack)


def train_step(
    chunks: Sequence[Any],
    optimizer: Any,
    packs: Sequence[Pack],
    algorithm: Algorithm,
    parallel: Parallel,
) -> StepResult:
    """Forward, backward and update over one global batch; `packs` are this data-parallel rank's part of it.

    Raises: NonFiniteStep when the loss or a gradient is not finite, before any weight changes.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()

    def on_output(
        logp_R: torch.Tensor, pack: DevicePack
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = algorithm.loss(logp_R, pack)
        return out.loss_sum, out.count, torch.cat([out.count[None].float(), out.metric_sums])

    collected = run_schedule(chunks, packs, on_output, parallel, forward_only=False)
    sums = torch.zeros(2 + len(algorithm.metric_names), dtype=torch.float64, device=parallel.device)
    if collected and parallel.counts_once:
        sums[1:] = torch.stack(collected).sum(0)
    sums[0] = torch.stack([gradients_not_finite(chunk) for chunk in chunks]).sum()
    dist.all_reduce(sums)  # now the job's sums, on every rank and stage
    faulty, count, *totals = sums.tolist()
    means = {
        name: total / max(count, 1.0)
        for name, total in zip(algorithm.metric_names, totals, strict=True)
    }
    if faulty or not math.isfinite(means["loss"]):
        bad = [
            pack for pack, row in zip(packs, collected, strict=False) if not row.isfinite().all()
        ]
        raise NonFiniteStep(means["loss"], [d for pack in bad for d in pack.document_P.tolist()])
    _, grad_norm, _ = optimizer.step()
    return StepResult(means, round(count), float(grad_norm or 0.0))


class NonFiniteStep(ArithmeticError):
    """The loss or a gradient is not finite; raised on every rank before any weight has changed.

    documents: those of this rank's packs with a loss that is not finite (none when only a gradient is at fault).
    """

    def __init__(self, loss: float, documents: list[int]) -> None:
        super().__init__(f"loss {loss}")
        self.loss, self.documents = loss, documents


def gradients_not_finite(chunk: Any) -> torch.Tensor:
    """1.0 when a gradient buffer of this chunk holds an infinite or undefined value, else 0.0."""
    buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
    norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers]
    return (~torch.stack(norms).isfinite()).any().double()


@torch.no_grad()
def response_logps(
    chunks: Sequence[torch.nn.Module], packs: Sequence[Pack], parallel: Parallel
) -> list[torch.Tensor]:
    """Sum of log-probabilities per response (B,) fp64 for each pack, on last-stage ranks; an empty list elsewhere."""

    def on_output(
        logp_R: torch.Tensor, pack: DevicePack
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros((), device=logp_R.device)
        return zero, zero.int(), sequence_logp(logp_R, pack)

    return run_schedule(chunks, packs, on_output, parallel, forward_only=True)
