"""Wiring in build order, and the loop. Read `train.py` first, then this, then `step.py`."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nova_sys.algo import build_algorithm
from nova_sys.checkpoint import (
    Checkpointer,
    Description,
    describe_model,
    latest_checkpoint,
    load_weights,
    new_identity,
    read_description,
    resolve_checkpoint,
)
from nova_sys.config import RunConfig
from nova_sys.config_io import to_toml
from nova_sys.data.loader import PackLoader
from nova_sys.data.prepare import PreparedData, prepare_data
from nova_sys.metrics import StepClock
from nova_sys.model.build import build_model, head_dim, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.optimizer import build_optimizer, build_schedule, wrap_for_training
from nova_sys.parallel import Parallel
from nova_sys.reference import OnlineReference, cache_key, cached_logps, compute_logps
from nova_sys.step import StepResult, train_step
from nova_sys.telemetry import Profiler, Telemetry

logger = logging.getLogger(__name__)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


class Trainer:
    """One run, from its configuration to its last checkpoint."""

    def __init__(self, config: RunConfig, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.run_dir = Path(config.run.dir)
        self.resume_from = self._find_run()
        self.dtype = choose_dtype(config.train.precision, parallel.device)
        self.algorithm = build_algorithm(config.algo)
        self.data = main_rank_first(parallel, config)
        self.vocab_size = config.model.vocab_size or self.data.tokenizer.vocab_size
        self.mcore_config = transformer_config(
            config.model,
            parallel,
            dtype=self.dtype,
            recompute=config.train.recompute,
            recompute_layers=config.train.recompute_layers,
        )
        self.chunks = self._build_initial_model()
        self.loader = self._build_loader()
        self.online = self._build_online_reference()
        self.total_steps = config.train.steps or self.loader.steps_for(config.train.epochs)
        self.ddp = wrap_for_training(
            self.chunks,
            self.mcore_config,
            parallel,
            distributed_optimizer=config.parallel.distributed_optimizer,
        )
        self.optimizer = build_optimizer(
            self.ddp,
            config.optimizer,
            dtype=self.dtype,
            distributed=config.parallel.distributed_optimizer,
        )
        self.checkpointer = Checkpointer(
            self.run_dir, config.checkpoint, rank=parallel.rank, world_size=parallel.world_size
        )
        self.start_step = self._resume()
        self.schedule = build_schedule(
            self.optimizer, config.optimizer, total_steps=self.total_steps
        )
        self.schedule.step(self.start_step)
        self.clock = StepClock(
            config.model, parallel, head_dim=head_dim(config.model), vocab_size=self.vocab_size
        )
        self.telemetry = Telemetry(
            self.run_dir,
            algorithm=self.algorithm.name,
            log=config.log,
            start_step=self.start_step,
            total_steps=self.total_steps,
            config_text=to_toml(config),
            is_main=parallel.is_main,
        )

    def train(self) -> None:
        """Steps until done, then the last checkpoint."""
        config = self.config
        profiler = Profiler(
            self.run_dir,
            config.log.profile_steps if self.parallel.is_main else None,
            start_step=self.start_step,
        )
        self.loader.start(self.start_step)
        try:
            for step in range(self.start_step, self.total_steps):
                self._one_step(step)
                profiler.step(step + 1)
                done = step + 1
                if config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0:
                    self.save(done)
                self.checkpointer.poll()
            if self.start_step < self.total_steps:
                self.save(self.total_steps)
            else:
                logger.info(
                    "step %d of %d is already done; nothing to train",
                    self.start_step,
                    self.total_steps,
                )
            self.checkpointer.close()
        finally:
            self.loader.stop()
            self.telemetry.close()
            profiler.close()

    def _one_step(self, step: int) -> None:
        began = time.perf_counter()
        packs = self.loader.next()
        data_wait_s = time.perf_counter() - began
        if self.online is not None:
            packs = self.online.score(packs)
        result = train_step(self.ddp, self.optimizer, packs, self.algorithm, self.parallel)
        if step == 0:
            self._check_first_loss(result)
        lr = next(group["lr"] for group in self.optimizer.param_groups)
        self.schedule.step(1)
        record = {"step": step + 1, **result.means, "grad_norm": result.grad_norm, "lr": lr}
        record[self.algorithm.count_name] = result.count
        record["epoch"] = (
            (step + 1) * self.config.train.global_batch_packs / self.loader.packs_per_epoch
        )
        record |= self.clock.record(packs, time.perf_counter() - began, data_wait_s)
        if self.algorithm.name == "sft":
            del record["pairs_per_s"]
        self.telemetry.step(record)

    def save(self, step: int) -> None:
        identity = new_identity()
        description = Description(
            step=step,
            model=describe_model(self.config.model),
            vocab_size=self.vocab_size,
            data_order=self._data_order(),
            world_size=self.parallel.world_size,
            identity=identity,
        )
        self.checkpointer.save(
            description,
            self.chunks,
            self.optimizer,
            config_text=to_toml(self.config),
            tokenizer_dir=self.data.tokenizer_dir,
        )

    # -- building ---------------------------------------------------------------------------------------------------

    def _find_run(self) -> Path | None:
        """The checkpoint to resume from, if the folder holds a run. Raises: ValueError when it may not be touched."""
        newest = latest_checkpoint(self.run_dir)
        if self.config.run.resume == "never" and (
            newest or (self.run_dir / "metrics.jsonl").exists()
        ):
            raise ValueError(
                f"run.dir={self.run_dir} already holds a run and run.resume='never'; choose another run.dir, or set run.resume='auto'"
            )
        return newest

    def _build_initial_model(self) -> list[PackedGPT]:
        config = self.config
        chunks = build_model(
            config.model,
            self.mcore_config,
            self.parallel,
            vocab_size=self.vocab_size,
            max_positions=config.data.pack_length,
            seed=config.train.seed,
        )
        if config.model.init_from:
            load_weights(
                resolve_checkpoint(config.model.init_from), chunks, config.model, self.vocab_size
            )
        return chunks

    def _initial_identity(self) -> str:
        """Names the weights that the run starts from, for the key of the reference cache."""
        if self.config.model.init_from:
            return read_description(resolve_checkpoint(self.config.model.init_from)).identity
        return f"random {describe_model(self.config.model)} {self.config.model.init_std} {self.config.model.kv_shift_init} {self.vocab_size} {self.config.train.seed} {torch.__version__}"

    def _build_loader(self) -> PackLoader:
        """The loader, with reference log-probs attached when the algorithm wants them from the cache."""
        config = self.config
        epochs = None if config.train.steps else config.train.epochs

        def loader(epochs: float | None, ref_logp: np.ndarray | None = None) -> PackLoader:
            return PackLoader(
                self.data.store,
                pack_length=config.data.pack_length,
                global_batch_packs=config.train.global_batch_packs,
                data_rank=self.parallel.data_rank,
                data_size=self.parallel.data_size,
                seed=config.train.seed,
                share_prefix=config.data.share_prefix,
                epochs=epochs,
                ref_logp=ref_logp,
            )

        if not self.algorithm.needs_reference or config.algo.reference == "online":
            return loader(epochs)
        key = cache_key(
            self._initial_identity(), self.data.store.key, str(self.dtype), config.data.share_prefix
        )
        one_pass = loader(1.0)

        def compute() -> np.ndarray:
            logger.info(
                "reference log-probs of %d responses: one forward pass",
                self.data.store.num_responses,
            )
            return compute_logps(
                self.chunks,
                one_pass,
                self.data.store.num_responses,
                self.parallel,
                on_step=log_tenths,
            )

        ref_logp, was_there = cached_logps(
            self.data.cache_dir / f"reference-{key}.npy", compute, self.parallel
        )
        logger.info(
            "reference log-probs: %s", "from the cache" if was_there else "computed and cached"
        )
        return loader(epochs, ref_logp)

    def _build_online_reference(self) -> OnlineReference | None:
        if not self.algorithm.needs_reference or self.config.algo.reference == "cache":
            return None
        return OnlineReference(self._build_initial_model(), self.parallel)

    def _data_order(self) -> dict:
        config = self.config
        return {
            "data_key": self.data.store.key,
            "seed": config.train.seed,
            "global_batch_packs": config.train.global_batch_packs,
            "pack_length": config.data.pack_length,
            "share_prefix": config.data.share_prefix,
        }

    def _resume(self) -> int:
        """Restores the run's newest checkpoint. Raises: ValueError when it belongs to another run."""
        if self.resume_from is None:
            return 0
        saved = read_description(self.resume_from)
        ours = {
            **self._data_order(),
            **describe_model(self.config.model),
            "vocab_size": self.vocab_size,
        }
        theirs = {**saved.data_order, **saved.model, "vocab_size": saved.vocab_size}
        differing = [
            f"{k}: {theirs.get(k)} there, {v} here" for k, v in ours.items() if theirs.get(k) != v
        ]
        if differing:
            raise ValueError(
                f"run.dir={self.run_dir} holds another run ({'; '.join(differing)}); choose another run.dir, or restore these settings"
            )
        step = self.checkpointer.resume(self.resume_from, self.chunks, self.optimizer)
        logger.info("resumed from %s: step %d is done", self.resume_from, step)
        return step

    def _check_first_loss(self, result: StepResult) -> None:
        """Step 0 of DPO: policy and reference are the same weights, every margin is 0 and the loss is ln 2."""
        config = self.config
        if not (self.algorithm.needs_reference and config.train.check_first_loss):
            return
        tolerance = 1e-5 if self.dtype == torch.float32 else 1e-3
        off = abs(result.means["loss"] - math.log(2.0))
        if off > tolerance:
            raise RuntimeError(
                f"the first DPO loss is {result.means['loss']:.7f}, which is {off:.1e} from ln 2 = 0.6931472 (allowed: {tolerance:.0e}). "
                "Policy and reference should be equal at step 0. Usual causes: reference log-probs of other weights or data (delete the cache folder), "
                "randomness in the forward pass such as dropout, or a fault in tensor or sequence parallelism. "
                "train.check_first_loss=false turns this check off"
            )


def log_tenths(done: int, total: int) -> None:
    """Tells of every tenth of a long pass."""
    if total >= 10 and done * 10 // total > (done - 1) * 10 // total:
        logger.info("reference: %d%%", 100 * done // total)


def main_rank_first(parallel: Parallel, config: RunConfig) -> PreparedData:
    """Tokenises on the main rank; the others wait, then open the finished store. An error on the main rank reaches all."""
    start = config.model.init_from
    tokenizer_dir = resolve_checkpoint(start) / "tokenizer" if start else None
    prepared: PreparedData | None = None
    outcome: list[str | None] = [None]
    if parallel.is_main:
        try:
            prepared = prepare_data(config, tokenizer_dir)
        except ValueError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)  # now every rank knows whether the data is ready
    if outcome[0] is not None:
        raise ValueError(outcome[0])
    return prepared or prepare_data(config, tokenizer_dir)
