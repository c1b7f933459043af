"""One optimizer step, and one forward pass, on Megatron's pipeline schedules. A micro-batch is a pack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_model_config

from nova_kernels.ranges import profiler_range, ranged
from nova_sys.algo.base import Algorithm, sequence_logp
from nova_sys.data.batch import DevicePack, Pack
from nova_sys.parallel import Parallel
from nova_sys.stopping import StopRequest


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
        parallel.watchdog.progress()
        with profiler_range("nova.pack to device"):
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


@ranged("nova.loss")
def _swap(on_output: Callable, pack: DevicePack, output: torch.Tensor) -> tuple:
    return on_output(output, pack)


def train_step(
    chunks: Sequence[Any],
    optimizer: Any,
    packs: Sequence[Pack],
    algorithm: Algorithm,
    parallel: Parallel,
    stop: StopRequest,
) -> StepResult:
    """Forward, backward and update over one global batch; `packs` are this data-parallel rank's part of it.

    Also tells every rank whether one was asked to stop, so that all stop after the same step.
    Raises: NonFiniteStep when the loss or a gradient is not finite, on every rank, before any weight or moment changes.
    """
    with parallel.watchdog.phase("forward and backward"):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        collected = run_schedule(
            chunks, packs, partial(_loss, algorithm, parallel), parallel, forward_only=False
        )
        width = 3 + len(algorithm.metric_names)
        sums = torch.zeros(width, dtype=torch.float64, device=parallel.device)
        if collected and parallel.counts_once:
            sums[2:] = torch.stack(collected).sum(0)
        sums[0] = torch.stack([gradient_square(chunk) for chunk in chunks]).sum()
        sums[1] = stop.is_set
        dist.all_reduce(sums)  # now the job's sums, on every rank and stage
        square, num_stops, count, *totals = sums.tolist()
    stop.agreed = num_stops > 0
    means = {
        name: total / max(count, 1.0)
        for name, total in zip(algorithm.metric_names, totals, strict=True)
    }
    gradient_fits = square <= MAX_GRADIENT_SQUARE  # false for NaN
    if not (gradient_fits and all(map(math.isfinite, totals))):
        faulty = [index for index, row in enumerate(collected) if not row.isfinite().all()]
        raise NonFiniteStep(means, faulty)
    with parallel.watchdog.phase("optimizer"):
        succeeded, grad_norm, _ = optimizer.step()
    if not succeeded:  # Megatron found what is not finite by itself: it has changed nothing, and would go on in silence
        raise NonFiniteStep(means, [])
    return StepResult(means, round(count), float(grad_norm or 0.0))


def _loss(
    algorithm: Algorithm, parallel: Parallel, logp_R: torch.Tensor, pack: DevicePack
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = algorithm.loss(logp_R, pack)
    # Ranks that share a pack all compute its loss, each for the gradient of its own rows; the schedule adds the counts of all ranks.
    count = out.count * int(parallel.context_rank == 0)
    return out.loss_sum, count, torch.cat([out.count[None].double(), out.metric_sums])


class NonFiniteStep(ArithmeticError):
    """The loss, a metric or a gradient is not finite; raised on every rank before any weight has changed.

    means: of the whole job.   packs: this rank's packs with a loss or metric that is not finite, on last-stage ranks.
    """

    def __init__(self, means: dict[str, float], packs: list[int]) -> None:
        super().__init__(f"means {means}")
        self.means, self.packs = means, packs

    @property
    def only_gradient(self) -> bool:
        """True, on every rank alike, when all losses and metrics are finite."""
        return all(map(math.isfinite, self.means.values()))


MAX_GRADIENT_SQUARE = float(torch.finfo(torch.float32).max)
"""A larger sum of squares is infinite in the fp32 norm that gradients are clipped by, which would make them all zero."""


def gradient_square(chunk: Any) -> torch.Tensor:
    """Sum of squares (fp64) of this chunk's gradient buffers: infinite or NaN when an element is."""
    buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
    norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers]
    return torch.stack(norms).double().square().sum()


def packs_with_faulty_gradient(
    chunks: Sequence[Any], packs: Sequence[Pack], algorithm: Algorithm, parallel: Parallel
) -> list[int]:
    """Runs every pack by itself, forward and backward without reduction over ranks, into the gradient buffers.

    Returns those of `packs` that give this rank's weights a gradient that is not finite. For the fault path: it costs another step.
    """
    config = get_model_config(chunks[0])
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    no_sync, config.no_sync_func = config.no_sync_func, None
    copies = parallel.pipeline_size if len(chunks) > 1 else 1  # what an interleaved schedule needs
    faulty = []
    try:
        for index, pack in enumerate(packs):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            with parallel.watchdog.phase("faulty step, pack by pack"), ExitStack() as stack:
                for chunk in chunks:
                    stack.enter_context(chunk.no_sync())
                run_schedule(
                    chunks,
                    [pack] * copies,
                    partial(_loss, algorithm, parallel),
                    parallel,
                    forward_only=False,
                )
            square = torch.stack([gradient_square(chunk) for chunk in chunks]).sum()
            if not square.item() <= MAX_GRADIENT_SQUARE:
                faulty.append(index)
    finally:
        config.finalize_model_grads_func, config.no_sync_func = finalize, no_sync
    return faulty


@torch.no_grad()
def response_logps(
    chunks: Sequence[torch.nn.Module], packs: Sequence[Pack], parallel: Parallel
) -> list[torch.Tensor]:
    """Sum of log-probabilities per response (B,) fp64 for each pack, on last-stage ranks; an empty list elsewhere.

    In eval mode: with recomputation, Transformer Engine would keep the scales of these passes for a backward pass that never comes.
    """

    def on_output(
        logp_R: torch.Tensor, pack: DevicePack
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros((), device=logp_R.device)
        return zero, zero.int(), sequence_logp(logp_R, pack)

    trained = [chunk for chunk in chunks if chunk.training]
    try:
        for chunk in trained:
            chunk.eval()
        with parallel.watchdog.phase("forward without gradients"):
            return run_schedule(chunks, packs, on_output, parallel, forward_only=True)
    finally:
        for chunk in trained:
            chunk.train()
