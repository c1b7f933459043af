"""Process groups of a run: the only file that touches Megatron's parallel_state. Groups travel downward as arguments.

Ranks are ordered tensor-parallel first, then context-parallel, then data-parallel, then pipeline: neighbours share a node's fast links.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nova_sys.config import ParallelConfig
from nova_sys.cpu_mode import enable_cpu_mode, use_cpu_threads
from nova_sys.watchdog import Watchdog, collective_timeout_s

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's place in the layout, and the groups it talks to."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    data_rank: int
    data_size: int
    sequence: bool
    device: torch.device
    groups: ProcessGroupCollection
    watchdog: Watchdog

    @property
    def is_main(self) -> bool:
        """The rank that logs and writes the run's small files."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def counts_once(self) -> bool:
        """True on one rank per data-parallel replica: last pipeline stage, first tensor- and context-parallel rank. Sums count there."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0

    def first_stage(self, chunk: int) -> bool:
        return self.pipeline_rank == 0 and chunk == 0

    def last_stage(self, chunk: int) -> bool:
        return self.is_last_stage and chunk == self.virtual_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this pipeline: the source of broadcasts of what only that stage knows."""
        return dist.get_global_rank(self.groups.pp, self.pipeline_size - 1)

    def describe(self) -> str:
        return (
            f"{self.world_size} ranks = tensor {self.tensor_size}{' + sequence' if self.sequence else ''}"
            f"{f' x context {self.context_size}' if self.context_size > 1 else ''} x pipeline "
            f"{self.pipeline_size}{f' x {self.virtual_size} chunks' if self.virtual_size > 1 else ''} x data {self.data_size}"
        )


def current_world_size() -> int:
    """Ranks of this job, before or after it was joined."""
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def build_parallel(config: ParallelConfig, *, seed: int, hangs_dir: Path | None = None) -> Parallel:
    """Joins the job (NCCL on GPUs, gloo without), builds every group, seeds Megatron's random trackers, and starts the watchdog.

    Args:   hangs_dir: folder for the reports of ranks when one stops answering; None: they go to standard error.
    Raises: ValueError when tensor * context * pipeline does not divide the world size.
    """
    world = current_world_size()
    model_ranks = config.tensor * config.context * config.pipeline
    if world % model_ranks:
        raise ValueError(
            f"parallel: tensor={config.tensor} * context={config.context} * pipeline={config.pipeline} = {model_ranks} does not divide "
            f"the {world} ranks of this job; lower one of them, or start a multiple of that many ranks with --nproc"
        )
    use_cpu_threads()
    enable_cpu_mode()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_ranks > torch.cuda.device_count():
            raise ValueError(
                f"{local_ranks} ranks on a machine with {torch.cuda.device_count()} GPUs; each rank needs its own. Start fewer, or hide the "
                "GPUs (CUDA_VISIBLE_DEVICES= before the command) to run on the CPU"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=collective_timeout_s(config.timeout_s))
    if not dist.is_initialized():
        if device.type == "cuda" and hangs_dir is not None:
            _let_nccl_dump_into(hangs_dir)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if world == 1 else "29500")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            rank=int(os.environ.get("RANK", "0")),
            world_size=world,
        )
    parallel_state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Parallel(
        rank=dist.get_rank(),
        world_size=world,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=config.tensor,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=config.context,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=config.pipeline,
        virtual_size=config.virtual_pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        sequence=config.sequence,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        watchdog=_start_watchdog(config.timeout_s, hangs_dir),
    )


def _start_watchdog(timeout_s: float, hangs_dir: Path | None) -> Watchdog:
    started = [time.strftime("%Y%m%d-%H%M%S")]
    dist.broadcast_object_list(started, src=0)  # now all ranks name their reports alike
    many = dist.get_world_size() > 1
    native: Any = torch._C
    return Watchdog(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        timeout_s=timeout_s,
        store=dist.distributed_c10d._get_default_store() if many else None,
        folder=hangs_dir,
        started=started[0],
        flight_recorder=native._distributed_c10d._dump_nccl_trace
        if dist.get_backend() == "nccl"
        else None,
    )


def _let_nccl_dump_into(hangs_dir: Path) -> None:
    """For timeouts in phases that the watchdog does not watch, where NCCL aborts the process: torch's flight recorder into
    <hangs_dir>/nccl-rank<k>, Python's stacks into the job's output."""
    faulthandler.enable()
    with contextlib.suppress(OSError):  # the run's lock tells of a folder that cannot be written to
        hangs_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(hangs_dir / "nccl-rank"))


@contextmanager
def parallel_run(
    config: ParallelConfig, *, seed: int, hangs_dir: Path | None = None
) -> Iterator[Parallel]:
    """`build_parallel`, and on leaving takes down what it built (also after an error)."""
    joined_before = dist.is_initialized()
    parallel = build_parallel(config, seed=seed, hangs_dir=hangs_dir)
    try:
        yield parallel
    except Exception as error:
        parallel.watchdog.raised(error)
        raise
    finally:
        parallel.watchdog.close()
        parallel_state.destroy_model_parallel()
        if not joined_before:
            dist.destroy_process_group()


_turns = itertools.count()


def main_rank_first(parallel: Parallel, work: Callable[[], T]) -> T:
    """`work()` on the main rank, then on the others, which find done what it left on the disk.

    The others wait at the job's key-value store, not in a collective: preparing data may take longer than any collective should. The
    watchdog ends the job when the main rank shows no sign of life.
    Raises: what `work` raised on the main rank, on every rank.
    """
    with parallel.watchdog.phase("one rank works, the others wait", watched=False):
        return _main_rank_first(parallel, work)


def _main_rank_first(parallel: Parallel, work: Callable[[], T]) -> T:
    key = f"nova/main_rank_first/{next(_turns)}"
    store = dist.distributed_c10d._get_default_store()
    if parallel.is_main:
        try:
            result = work()
        except Exception as error:
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            store.set(key, f"{kind}\n{error}")
            raise
        store.set(key, "done")
        return result
    store.wait([key], datetime.timedelta(days=7))
    kind, _, message = store.get(key).decode().partition("\n")
    if kind == "ValueError":
        raise ValueError(message)
    if kind != "done":
        raise RuntimeError(f"rank 0 failed: {kind}: {message}")
    return work()


def from_main(parallel: Parallel, decide: Callable[[], T], *, slow: bool = False) -> T:
    """What the main rank decides, on every rank: ranks that look at a disk for themselves may see different things.

    slow: it may take longer than a collective should (to name a model, all its bytes are read): the others wait as in `main_rank_first`.
    Raises: the ValueError or OSError that `decide` raised there, on every rank, as a ValueError.
    """
    box: list[Any] = [None]

    def work() -> None:
        if parallel.is_main:
            try:
                box[0] = (decide(), None)
            except (ValueError, OSError) as error:
                box[0] = (None, str(error))

    if slow:
        main_rank_first(parallel, work)
    else:
        work()
    dist.broadcast_object_list(
        box, src=0
    )  # now every rank has the decision, or the reason against it
    decision, problem = box[0]
    if problem is not None:
        raise ValueError(problem)
    return decision


def on_any_rank(parallel: Parallel, true_here: bool) -> bool:
    """Whether it is true on some rank, on every rank."""
    found = torch.tensor(true_here, dtype=torch.int32, device=parallel.device)
    dist.all_reduce(found)  # now the number of ranks where it is true
    return bool(found)


@contextmanager
def shared_scratch(parallel: Parallel) -> Iterator[Path]:
    """A temporary folder of the main rank that all ranks of one machine see, removed at the end."""
    box = [tempfile.mkdtemp(prefix="nova_") if parallel.is_main else ""]
    dist.broadcast_object_list(box, src=0)  # now every rank knows the folder
    try:
        yield Path(box[0])
    finally:
        if parallel.is_main:
            shutil.rmtree(box[0], ignore_errors=True)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of weights and activations. auto: bf16 on a GPU, fp32 on a CPU. FP8 lives inside of linear layers only."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16
