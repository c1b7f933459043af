"""Megatron's part of a checkpoint: who writes which tensors, the files that hold them, and reading them on any layout.

Megatron also has its own way to run the writing: three processes for each rank, one of which keeps the results. They outlive a rank
that is killed, a signal to the group ends them before the rank has saved, and a writer that is killed is waited for without end. So
only its plan and its file format are used here; `write` runs wherever the caller wants it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

BYTES_AROUND_TENSOR = 4096
"""torch.save's frame of a tensor, and its entries in the metadata file."""

filesystem_async._get_write_results_queue = lambda: None  # the process that keeps the results


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
        self._buckets = self._writer.preload_tensors(self._writer.write_buckets or [])

    def write(self) -> list[Any]:
        """Writes this rank's files, synced to the disk. Returns where each tensor lies. Raises: OSError."""
        outcomes: list[Any] = []
        results: Any = SimpleNamespace(put=lambda outcome: outcomes.append(outcome[1]))
        no_queue: Any = SimpleNamespace(get=lambda: None, task_done=lambda: None)
        transforms = [self._writer.transforms]
        for bucket in self._buckets:
            self._writer.write_preloaded_data(transforms, 0, bucket, results, no_queue, True)
        for error in (o for o in outcomes if isinstance(o, Exception)):
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__  # torch.save says "unexpected pos" when the disk is full
            raise cause or error
        return [result for outcome in outcomes for result in outcome]

    def finish(self, written: list[list[Any]]) -> None:
        """On rank 0, with what `write` returned on each rank: the files that tell where everything lies. Raises: OSError."""
        vars(self._metadata).pop("all_local_plans", None)  # as long as all the rest, and not needed
        self._writer.finish(self._metadata, written)
        save_config(CheckpointingConfig("torch_dist"), str(self._folder))


def plan_shards(state: dict[str, Any], folder: Path) -> PlannedShards:
    """Plans the writing of a sharded state dict, and writes what is not a tensor. Every rank."""
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
        why = "no tensor is where one should be" if _no_tensor(problem) else f"{problem}"
        raise ValueError(
            f"{folder} cannot be loaded, though its files have the right sizes: {why} (rank {rank}). "
            "Restore it from a copy, or use another one"
        ) from None


def _no_tensor(problem: BaseException) -> bool:
    return isinstance(problem, pickle.UnpicklingError)  # whose text advises to load it all the same
