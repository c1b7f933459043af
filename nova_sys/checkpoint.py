"""Checkpoints: Megatron's distributed format, atomic, asynchronous, layout-free, the last k kept.

A checkpoint is the folder `<run.dir>/checkpoints/step_00000050`. It is written under a hidden name beside it and renamed when
every rank has finished and every byte is on the disk, so a folder with that name is complete. Inside: Megatron's shards,
`nova.json` (what it is a checkpoint of, and the sizes of its files), `config.toml`, `tokenizer/`, and `template.jinja` if the chat
template was a file, so that the folder alone is enough to evaluate, generate, or start another run.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from nova_sys.checkpoint_files import (
    DESCRIPTION,
    Description,
    all_checkpoints,
    checkpoints_dir,
    describe_model,
    file_sizes,
    latest_checkpoint,
    read_description,
    refuse_damaged,
    refuse_harmful,
    sync_to_disk,
)
from nova_sys.config import CheckpointConfig, ModelConfig
from nova_sys.errors import HANG_EXIT_CODE, end_at_once
from nova_sys.forked import ForkedCall
from nova_sys.model.te import load_scales, scale_shards
from nova_sys.optimizer import load_optimizer
from nova_sys.shards import PlannedShards, bytes_on_disk, plan_shards, read_shards

MARGIN_BYTES = 1 << 20
"""For the small files."""
PROBE_BYTES = 1 << 16
NUM_LISTED = 8
# The optimizer state as one tensor per weight, so that another layout can read it.
RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def _refuse_unreadable(checkpoint: Path) -> None:
    refuse_damaged(checkpoint)
    refuse_harmful(checkpoint)


def _read(state: dict[str, Any], checkpoint: Path) -> Any:
    """Megatron's loading, of a checkpoint that rank 0 has looked at first. Raises: ValueError on every rank."""
    _on_rank_0(lambda: _refuse_unreadable(checkpoint))
    return read_shards(state, checkpoint)


def _on_rank_0(work: Callable[[], None]) -> None:
    """Raises: the ValueError or OSError that `work` raised there, on every rank, as a ValueError."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)  # now every rank knows how it went
    if problem[0] is not None:
        raise ValueError(problem[0])


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Tensors only. Transformer Engine's layers also offer a pickled `_extra_state` each; what matters of it is in `scale_shards`."""
    return {
        f"model{index}": {
            key: value
            for key, value in chunk.sharded_state_dict().items()
            if not isinstance(value, ShardedObject)
        }
        for index, chunk in enumerate(chunks)
    }


def load_weights(
    checkpoint: Path, chunks: Sequence[Any], model: ModelConfig, vocab_size: int
) -> None:
    """Loads the weights alone, on any layout. KV-shift scalars that the checkpoint lacks stay as initialised.

    Raises: ValueError when the checkpoint is of a model with other shapes; it names the fields.
    """
    saved = read_description(checkpoint)
    wanted = describe_model(model)
    then = describe_model(ModelConfig()) | saved.model  # fields that were not there yet
    differing = {
        k: (then.get(k), v) for k, v in wanted.items() if then.get(k) != v and k != "kv_shift"
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
    loaded = _read(state, checkpoint)
    for index, chunk in enumerate(chunks):
        _fill(chunk, loaded[f"model{index}"], may_lack=("_extra_state", "mix_K2"))


def _fill(chunk: Any, weights: dict[str, Any], may_lack: tuple[str, ...]) -> None:
    missing, surplus = chunk.load_state_dict(weights, strict=False)
    unexpected = [name for name in missing if not any(part in name for part in may_lack)]
    assert not surplus and not unexpected, (unexpected, surplus)


@dataclass(frozen=True, kw_only=True)
class _Saving:
    """A save that is being written. final: the folder's name when it is complete; num_bytes: of all ranks together."""

    description: Description
    partial: Path
    final: Path
    planned: PlannedShards
    num_bytes: int
    texts: dict[str, str]
    tokenizer_dir: Path
    call: ForkedCall[list[Any]]


class Checkpointer:
    """Saves and resumes one run. Every rank calls every method at the same step.

    A writer that gets nothing written for timeout_s ends the job, like any rank that does not answer.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        self.run_dir, self.dir = run_dir, checkpoints_dir(run_dir)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.timeout_s = timeout_s
        self._progress = (0, 0.0)
        """This rank's writer's, and when it was first seen."""
        self._saving: _Saving | None = None
        self._last_step = -1
        if rank == 0:
            for torn in self.dir.glob(".step_*"):  # left by a run that was killed while it saved
                shutil.rmtree(torn, ignore_errors=True)

    def folder(self, step: int) -> Path:
        return self.dir / f"step_{step:08d}"

    def save(
        self,
        description: Description,
        chunks: Sequence[Any],
        optimizer: Any,
        *,
        texts: dict[str, str],
        tokenizer_dir: Path,
    ) -> None:
        """Writes a checkpoint; in the background if the config says so (see `poll`). texts: more files of it, by name.

        Raises: ValueError on every rank when the disk is full or refuses; also about the save that was in the background.
        """
        if description.step == self._last_step:
            return
        self._last_step = description.step
        self.wait()  # one save at a time
        final = self.folder(description.step)
        # a name of its own: a writer that a killed run may have left on another machine cannot write into it
        partial = self.dir / f".{final.name}.{description.identity[:12]}"
        state = self._state(chunks, optimizer)
        own_bytes = bytes_on_disk(state)
        if self.rank == 0:
            with suppress(OSError):  # copying them will tell
                own_bytes += sum(file_sizes(tokenizer_dir).values())
        (num_bytes,) = self._sum_over_ranks(own_bytes)
        _on_rank_0(lambda: self._make_room(partial, num_bytes))
        planned = plan_shards(state, partial)
        self._progress = (0, time.monotonic())
        self._saving = _Saving(
            description=description,
            partial=partial,
            final=final,
            planned=planned,
            num_bytes=num_bytes,
            texts=texts,
            tokenizer_dir=tokenizer_dir,
            call=ForkedCall(planned.write),
        )
        if not self.config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Publishes a background save that has finished. Cheap; called once per step."""
        if self._saving is None:
            return
        running, seen = self._saving.call.is_running(), self._saving.planned.progress
        if seen != self._progress[0]:
            self._progress = (seen, time.monotonic())
        stuck = running and time.monotonic() - self._progress[1] > self.timeout_s
        num_running, num_stuck = self._sum_over_ranks(running, stuck)
        if num_stuck:
            self._end_stuck(self._saving, stuck)
        if not num_running:
            saving, self._saving = self._saving, None
            self._finish(saving)

    def _end_stuck(self, saving: _Saving, stuck: bool) -> NoReturn:
        """The writers cannot be waited for: a disk that does not answer lets go of no process."""
        mine = f"rank {self.rank} (host {socket.gethostname()}, pid {saving.call.pid})"
        everybody: list[str | None] = [None] * self.world_size
        dist.all_gather_object(everybody, mine if stuck else None)  # now all know whose
        names = [name for name in everybody if name]
        more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
        end_at_once(
            f"the checkpoint {saving.partial} could not be saved: the writing process of {', '.join(names[:NUM_LISTED])}{more} has "
            f"written nothing for parallel.timeout_s = {self.timeout_s:g}, so the job was ended. Is the process stopped, or the disk or "
            "the network gone? If the disk is only slow, raise parallel.timeout_s. The same command resumes from the last checkpoint",
            HANG_EXIT_CODE,
            speaks=self.rank == 0,
        )

    def wait(self) -> None:
        while self._saving:
            self.poll()
            time.sleep(0.02)

    def close(self) -> None:
        """Ends a save that is still being written, after an error: the run is not there to publish it."""
        if self._saving:
            self._saving.call.kill()
            if self.rank == 0:
                shutil.rmtree(self._saving.partial, ignore_errors=True)
            self._saving = None

    def _make_room(self, partial: Path, num_bytes: int) -> None:
        """On rank 0. Raises: ValueError when the folder cannot be written to, or so many bytes do not fit."""
        try:
            partial.mkdir(parents=True, exist_ok=True)
            probe = partial / "probe"  # a quota does not show in the free space
            probe.write_bytes(bytes(PROBE_BYTES))
            probe.unlink()
            if shutil.disk_usage(partial).free >= num_bytes + MARGIN_BYTES:
                return
            problem = "the disk is too full"
        except OSError as error:
            problem = str(error)
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(self._not_saved(partial, problem, num_bytes))

    def _finish(self, saving: _Saving) -> None:
        """Every rank has written, or failed. Raises: ValueError on every rank when one has failed, or the disk does now."""
        written: Any
        try:
            written = saving.call.result()
        except Exception as error:
            written = error
        everybody: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(written, everybody)
        _on_rank_0(lambda: self._publish(saving, everybody or []))

    def _publish(self, saving: _Saving, written: list[Any]) -> None:
        """On rank 0: the small files, then the name."""
        partial = saving.partial
        try:
            for problem in (w for w in written if isinstance(w, Exception)):
                raise problem
            saving.planned.finish(written)
            for name, text in saving.texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            shutil.copytree(saving.tokenizer_dir, partial / "tokenizer")
            described = replace(saving.description, files=file_sizes(partial))
            (partial / DESCRIPTION).write_text(json.dumps(asdict(described), indent=1))
            sync_to_disk(partial)
            partial.rename(saving.final)
            sync_to_disk(self.dir)
        except OSError as error:
            problem = str(error)
        except Exception:
            problem = traceback.format_exc()
        else:
            self._prune()
            return
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(self._not_saved(partial, problem, saving.num_bytes))

    def _not_saved(self, partial: Path, problem: str, num_bytes: int) -> str:
        free = shutil.disk_usage(self.run_dir).free
        newest = latest_checkpoint(self.run_dir)
        needs = f"It needs {num_bytes + MARGIN_BYTES:,} bytes; {free:,} are free on that disk, less if a quota is smaller"
        goes_on = f"continues from {newest}" if newest else "starts from the beginning"
        return (
            f"the checkpoint {partial} could not be saved: {problem}. {needs}. Make room there (checkpoint.keep={self.config.keep} "
            f"older ones are kept), or see to the disk; the same command then {goes_on}"
        )

    def _sum_over_ranks(self, *numbers: int) -> list[int]:
        totals = torch.tensor(numbers, dtype=torch.int64, device=torch.cuda.current_device())
        dist.all_reduce(totals)  # now the sums over the job
        return totals.tolist()

    def resume(self, checkpoint: Path, chunks: Sequence[Any], optimizer: Any) -> int:
        """Restores weights, optimizer and (on as many ranks, of the same kind) random states. Returns the number of steps done."""
        saved = read_description(checkpoint)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        state = self._state(chunks, optimizer, is_loading=True)
        if (saved.world_size, saved.device) != (self.world_size, kind):
            del state["random"]
        loaded = _read(state, checkpoint)
        for index, chunk in enumerate(chunks):
            _fill(chunk, loaded[f"model{index}"], may_lack=("_extra_state",))
        load_optimizer(optimizer, loaded["optimizer"])
        load_scales(chunks, loaded.get("scales", {}))
        if "random" in loaded:
            states = loaded["random"]
            torch.set_rng_state(states.pop("cpu"))
            torch.cuda.set_rng_state(states.pop("cuda"))
            _rng_tracker().set_states(states)
        return saved.step

    def _state(
        self, chunks: Sequence[Any], optimizer: Any, *, is_loading: bool = False
    ) -> dict[str, Any]:
        state = model_state(chunks)
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=RESHARDABLE
        )
        force_all_tensors_to_non_fp8(state)  # the optimizer has found its weights by identity
        state["scales"] = scale_shards(chunks)
        own = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}
        random = {**_rng_tracker().get_states(), **own}  # parallel.py has seeded them
        place = (0, self.rank, self.world_size)  # row `rank` of (world_size, bytes)
        state["random"] = {
            name: ShardedTensor.from_rank_offsets(f"random.{name}", s, place, prepend_axis_num=1)
            for name, s in random.items()
        }
        return state

    def _prune(self) -> None:
        for old in all_checkpoints(self.run_dir)[: -self.config.keep]:
            with suppress(OSError):  # somebody else removed it
                hidden = old.rename(old.with_name(f".{old.name}.old"))  # at no moment half of one
                shutil.rmtree(hidden, ignore_errors=True)


def _rng_tracker() -> Any:
    """Megatron's random states by name."""
    return get_cuda_rng_tracker()


def new_identity() -> str:
    """A fresh identity, the same on every rank."""
    box = [uuid.uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    return box[0]
