"""Megatron's part of a checkpoint: who writes which tensors, the files that hold them, and reading them on any layout.

Megatron also has its own way to run the writing: three processes for each rank, one of which keeps the results. They outlive a rank
that is killed, a signal to the group ends them before the rank has saved, and a writer that is killed is waited for without end. So
only its plan and its file format are used here; `write` runs wherever the caller wants it.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from nova_sys.checkpoint_files import COMMON, file_sizes

BYTES_AROUND_TENSOR = 4096
"""torch.save's frame of a tensor, and its entries in the metadata file."""

SYNC_BYTES = 1 << 29
"""So much is written, then synced, so that no single wait for the disk is long."""
LATE_S = 60.0
"""A network file system may show what other machines wrote so late."""

filesystem_async._get_write_results_queue = lambda: None  # the process that keeps the results


class _CommonState(TorchCommonSaveStrategy):
    """What is not a tensor, as `common.pt` will hold it. Megatron would write it on rank 0 while the other ranks go on into a
    collective, where they would wait for a rank 0 that has failed."""

    content = b""

    def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
        file = io.BytesIO()
        torch.save(common_state_dict, file)
        self.content = file.getvalue()


_common_state = _CommonState("torch", 1)
register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _common_state)


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the plan."""

    writer: Any
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


class PlannedShards:
    """The tensors of a save, in host memory, and where they go."""

    def __init__(self, plan: _Plan, folder: Path) -> None:
        self._writer, self._metadata, self._folder = plan.writer, plan.metadata, folder
        self._common = _common_state.content
        self._buckets = self._writer.preload_tensors(self._writer.write_buckets or [])
        self._progress = mmap.mmap(-1, 8)  # forked processes share it

    @property
    def progress(self) -> int:
        """Grows while `write` gets on, also when that runs in a forked process."""
        return int.from_bytes(self._progress[:8], "little")

    def write(self) -> list[Any]:
        """Writes this rank's files, their contents synced to the disk. Returns where each tensor lies. Raises: OSError."""
        outcomes: list[Any] = []
        results: Any = SimpleNamespace(put=lambda outcome: outcomes.append(outcome[1]))
        no_queue: Any = SimpleNamespace(get=lambda: None, task_done=lambda: None)
        transforms = [self._writer.transforms]
        for path, name, (values, tensors) in self._buckets:
            bucket = (path, name, (values, self._step_by_step(path, tensors)))
            self._writer.write_preloaded_data(transforms, 0, bucket, results, no_queue, True)
        for error in (o for o in outcomes if isinstance(o, Exception)):
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__  # torch.save says "unexpected pos" when the disk is full
            raise cause or error
        return [result for outcome in outcomes for result in outcome]

    def _step_by_step(self, path: str, tensors: Sequence[Any]) -> Iterator[Any]:
        """The tensors, for a writer that asks for each when it has written the one before."""
        unsynced = 0
        for item, tensor in tensors:
            yield item, tensor
            unsynced += tensor.nbytes
            if unsynced >= SYNC_BYTES:
                unsynced = 0
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            self._progress[:8] = (self.progress + 1).to_bytes(8, "little")

    def finish(self, written: list[list[Any]]) -> None:
        """On rank 0, with what `write` returned on each rank: the files that tell where everything lies. Raises: OSError."""
        self._refuse_incomplete([result for results in written for result in results])
        (self._folder / COMMON).write_bytes(self._common)
        vars(self._metadata).pop("all_local_plans", None)  # as long as all the rest, and not needed
        self._writer.finish(self._metadata, written)
        save_config(CheckpointingConfig("torch_dist"), str(self._folder))

    def _refuse_incomplete(self, results: list[Any]) -> None:
        """Raises: OSError unless every planned tensor was written, and its bytes are to be seen from here."""
        unwritten = self._metadata.state_dict_metadata.keys() - {r.index.fqn for r in results}
        if unwritten:
            raise OSError(f"no rank has written {sorted(unwritten)[0]}")
        ends: dict[str, int] = {}
        for place in (result.storage_data for result in results):
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        began = time.monotonic()
        while short := _too_short(ends, file_sizes(self._folder)):
            if time.monotonic() - began > LATE_S:
                raise OSError(f"{short}, seen from the machine of rank 0")
            time.sleep(0.5)


def _too_short(ends: dict[str, int], sizes: dict[str, int]) -> str | None:
    for name, end in ends.items():
        if sizes.get(name, 0) < end:
            return f"{name} has {sizes.get(name, 0):,} of the {end:,} bytes that were written"
    return None


def plan_shards(state: dict[str, Any], folder: Path) -> PlannedShards:
    """Plans the writing of a sharded state dict. Every rank; no file is written."""
    plan = _Plan("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(folder), sharded_strategy=plan, async_sharded_save=True)
    return PlannedShards(plan, folder)


def bytes_on_disk(state: dict[str, Any]) -> int:
    """What this rank is going to write."""
    parts = [s for s in nested_values(state) if isinstance(s, ShardedTensor | ShardedTensorFactory)]
    tensors = [s.data for s in parts if s.data is not None and is_main_replica(s.replica_id)]
    return sum(tensor.nbytes + BYTES_AROUND_TENSOR for tensor in tensors)


def read_shards(state: dict[str, Any], folder: Path) -> Any:
    """Fills a sharded state dict. Every rank. Raises: ValueError on all of them when a tensor cannot be read."""
    try:
        return dist_checkpointing.load(state, str(folder))
    except CheckpointException as error:
        rank, (problem, _) = next(iter(error.failures.items()))
        if isinstance(problem, KeyError):
            raise ValueError(
                f"{folder} is no checkpoint of such a run, though nothing of it is damaged: {str(problem)[:200]} (rank {rank}). Was it "
                "saved with another parallel.distributed_optimizer, or of another model? Resume with the same"
            ) from None
        why = "no tensor is where one should be" if _no_tensor(problem) else f"{problem}"
        raise ValueError(
            f"{folder} cannot be loaded, though its files have the right sizes: {why} (rank {rank}). "
            "Restore it from a copy, or use another one"
        ) from None


def _no_tensor(problem: BaseException) -> bool:
    return isinstance(problem, pickle.UnpicklingError)  # whose text advises to load it all the same
