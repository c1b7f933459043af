"""Checkpoints: Megatron's distributed format, atomic, asynchronous, layout-free, the last k kept.

A checkpoint is the folder `<run.dir>/checkpoints/step_00000050`. It is written under a hidden name beside it and renamed when
every rank has finished, so a folder with that name is complete. Inside: Megatron's shards, `nova.json` (what it is a
checkpoint of), `config.toml` and `tokenizer/`, so that the folder alone is enough to evaluate, generate, or start another run.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from nova_sys.config import CheckpointConfig, ModelConfig
from nova_sys.optimizer import allocate_state, load_optimizer

FORMAT = 1
DESCRIPTION = "nova.json"
# The optimizer state as one tensor per weight, so that another layout can read it.
RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint says of itself. `identity` is unique to the save: caches of what these weights computed are keyed by it."""

    step: int
    model: dict[str, Any]
    vocab_size: int
    run: dict[str, Any]
    """`start.run_fields`: what a continuation must have the same."""
    data_key: str
    start_identity: str
    """Names the weights of step 0, which the reference log-probs belong to."""
    world_size: int
    identity: str
    format: int = FORMAT


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = sorted(
        p for p in checkpoints_dir(run_dir).glob("step_*") if (p / DESCRIPTION).is_file()
    )
    return complete[-1] if complete else None


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or a run folder's newest checkpoint. Raises: ValueError when there is none."""
    path = Path(path)
    if (path / DESCRIPTION).is_file():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise ValueError(
            f"{path} is not a checkpoint (no {DESCRIPTION}) and no run folder with one (no checkpoints/step_*); "
            "give a folder like runs/NAME or runs/NAME/checkpoints/step_00000050"
        )
    return newest


def read_description(checkpoint: Path) -> Description:
    fields = json.loads((checkpoint / DESCRIPTION).read_text())
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint}: checkpoint format {fields.get('format')}, this version reads {FORMAT}"
        )
    return Description(**fields)


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide the weights' shapes and meaning."""
    fields = asdict(model)
    for how_it_began in ("init_from", "init_std", "kv_shift_init", "vocab_size"):
        fields.pop(how_it_began)
    return fields


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def load_weights(
    checkpoint: Path, chunks: Sequence[Any], model: ModelConfig, vocab_size: int
) -> None:
    """Loads the weights alone, on any layout. KV-shift scalars that the checkpoint lacks stay as initialised.

    Raises: ValueError when the checkpoint is of a model with other shapes; it names the fields.
    """
    saved = read_description(checkpoint)
    wanted = describe_model(model)
    differing = {
        k: (saved.model.get(k), v)
        for k, v in wanted.items()
        if saved.model.get(k) != v and k != "kv_shift"
    }
    if saved.vocab_size != vocab_size:
        differing["vocab_size"] = (saved.vocab_size, vocab_size)
    if saved.model["kv_shift"] and not model.kv_shift:
        differing["kv_shift"] = (True, False)
    if differing:
        listed = ", ".join(f"{k}: checkpoint {a}, config {b}" for k, (a, b) in differing.items())
        raise ValueError(
            f"{checkpoint} holds another model ({listed}); set these model.* fields to the checkpoint's"
        )
    state = model_state(chunks)
    if model.kv_shift and not saved.model["kv_shift"]:
        state = {
            part: {k: v for k, v in s.items() if "mix_K2" not in k} for part, s in state.items()
        }
    loaded: Any = dist_checkpointing.load(state, str(checkpoint))
    for index, chunk in enumerate(chunks):
        missing, surplus = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        assert not surplus and all("mix_K2" in name for name in missing), (missing, surplus)


class Checkpointer:
    """Saves and resumes one run. Every rank calls every method at the same step."""

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, *, rank: int, world_size: int
    ) -> None:
        self.dir, self.config, self.rank, self.world_size = (
            checkpoints_dir(run_dir),
            config,
            rank,
            world_size,
        )
        self._queue = AsyncCallsQueue()
        self._last_step = -1
        if rank == 0:
            for torn in self.dir.glob(".step_*"):  # left by a run that was killed while it saved
                shutil.rmtree(torn, ignore_errors=True)

    def save(
        self,
        description: Description,
        chunks: Sequence[Any],
        optimizer: Any,
        *,
        config_text: str,
        tokenizer_dir: Path,
    ) -> None:
        """Writes a checkpoint; in the background if the config says so (see `poll`)."""
        if description.step == self._last_step:
            return
        self._last_step = description.step
        self.wait()  # one save at a time
        final = self.dir / f"step_{description.step:08d}"
        partial = self.dir / f".{final.name}.partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()  # now the folder exists for every rank
        state = self._state(chunks, optimizer, description.step)
        request = dist_checkpointing.save(
            state,
            str(partial),
            async_sharded_save=self.config.asynchronous,
            validate_access_integrity=True,
        )

        def publish() -> None:
            if self.rank == 0:
                (partial / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1))
                (partial / "config.toml").write_text(config_text)
                shutil.copytree(tokenizer_dir, partial / "tokenizer")
                partial.rename(final)
                self._prune()

        if request is None:
            dist.barrier()  # now every rank's shards are on disk
            publish()
            dist.barrier()  # now the checkpoint has its name
        else:
            request.add_finalize_fn(publish)
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publishes a background save that has finished. Cheap; called once per step."""
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        self.wait()
        self._queue.close()

    def resume(self, checkpoint: Path, chunks: Sequence[Any], optimizer: Any) -> int:
        """Restores weights, optimizer and (on the same number of ranks) random states. Returns the number of steps done."""
        saved = read_description(checkpoint)
        allocate_state(optimizer)
        state = self._state(chunks, optimizer, 0, is_loading=True)
        if saved.world_size != self.world_size:
            state.pop("rng")
        loaded: Any = dist_checkpointing.load(state, str(checkpoint))
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{index}"])
        load_optimizer(optimizer, loaded["optimizer"])
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["cpu"])
            torch.cuda.set_rng_state(loaded["rng"]["cuda"])
            _rng_tracker().set_states(loaded["rng"]["tracker"])
        return saved.step

    def _state(
        self, chunks: Sequence[Any], optimizer: Any, step: int, *, is_loading: bool = False
    ) -> dict[str, Any]:
        state = model_state(chunks)
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=RESHARDABLE
        )
        random = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(),
            "tracker": _rng_tracker().get_states(),
        }
        state["rng"] = ShardedObject("rng", random, (self.world_size,), (self.rank,))
        state["step"] = step
        return state

    def _prune(self) -> None:
        for old in sorted(self.dir.glob("step_*"))[: -self.config.keep]:
            hidden = old.rename(old.with_name(f".{old.name}.old"))  # at no moment half a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)


def _rng_tracker() -> Any:
    """Megatron's random states by name; parallel.py has seeded them."""
    return get_cuda_rng_tracker()


def new_identity() -> str:
    """A fresh identity, the same on every rank."""
    box = [uuid.uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    return box[0]
