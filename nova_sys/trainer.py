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
    load_weights,
    new_identity,
    read_description,
)
from nova_sys.config import RunConfig
from nova_sys.config_io import to_toml
from nova_sys.data.loader import PackLoader
from nova_sys.data.prepare import prepare_data
from nova_sys.metrics import StepClock
from nova_sys.model.build import build_model, head_dim, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.optimizer import build_optimizer, build_schedule, wrap_for_training
from nova_sys.parallel import Parallel, choose_dtype, from_main, main_rank_first
from nova_sys.reference import OnlineReference, cache_key, cached_logps, compute_logps
from nova_sys.start import find_start, first_weights, run_fields
from nova_sys.step import NonFiniteStep, StepResult, train_step
from nova_sys.telemetry import Profiler, Telemetry

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its configuration to its last checkpoint."""

    def __init__(self, config: RunConfig, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.run_dir = Path(config.run.dir)
        self.start = from_main(parallel, lambda: find_start(config))
        self.dtype = choose_dtype(config.train.precision, parallel.device)
        self.algorithm = build_algorithm(config.algo)
        self.data = main_rank_first(
            parallel, lambda: prepare_data(config, self.start.tokenizer_dir)
        )
        self.vocab_size = config.model.vocab_size or self.data.tokenizer.vocab_size
        self.mcore_config = transformer_config(
            config.model,
            parallel,
            dtype=self.dtype,
            recompute=config.train.recompute,
            recompute_layers=config.train.recompute_layers,
        )
        self.chunks = self._build_model()
        if self.start.resume_from is None:
            self._load_first_weights(self.chunks)
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
            config.model,
            parallel,
            head_dim=head_dim(config.model),
            vocab_size=self.vocab_size,
            dtype=self.dtype,
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
        try:
            result = train_step(self.ddp, self.optimizer, packs, self.algorithm, self.parallel)
        except NonFiniteStep as error:
            raise FloatingPointError(self._explain(step, error)) from None
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

    def _explain(self, step: int, error: NonFiniteStep) -> str:
        """Which step, and which documents of which ranks. Called on every rank."""
        everywhere: list[list[int]] = [[] for _ in range(self.parallel.world_size)]
        dist.all_gather_object(everywhere, error.documents)  # now every rank knows all of them
        documents = sorted({document for found in everywhere for document in found})
        where = ", ".join(f"{d} ({self.data.store.source_of(d)})" for d in documents)
        return (
            f"step {step + 1}: the loss is {error.loss} or a gradient is not finite; weights and optimizer are as before the step. "
            f"Documents in packs with such a loss: {where or 'none, so the fault lies in the backward pass'}. "
            "Look at them, lower optimizer.lr, or raise optimizer.warmup_steps; the run resumes from its last checkpoint"
        )

    def save(self, step: int) -> None:
        description = Description(
            step=step,
            model=describe_model(self.config.model),
            vocab_size=self.vocab_size,
            run=run_fields(self.config),
            data_key=self.data.store.key,
            start_identity=self.start.identity,
            world_size=self.parallel.world_size,
            identity=new_identity(),
        )
        self.checkpointer.save(
            description,
            self.chunks,
            self.optimizer,
            config_text=to_toml(self.config),
            tokenizer_dir=self.data.tokenizer_dir,
        )

    # -- building ---------------------------------------------------------------------------------------------------

    def _build_model(self) -> list[PackedGPT]:
        config = self.config
        return build_model(
            config.model,
            self.mcore_config,
            self.parallel,
            vocab_size=self.vocab_size,
            max_positions=config.data.pack_length,
            seed=config.train.seed,
        )

    def _load_first_weights(self, chunks: list[PackedGPT]) -> None:
        """The weights of step 0 into `chunks`, which are random so far."""
        folder = from_main(self.parallel, lambda: first_weights(self.start, self.config))
        if folder is not None:
            load_weights(folder, chunks, self.config.model, self.vocab_size)

    def _build_loader(self) -> PackLoader:
        """The loader, with reference log-probs attached when the algorithm wants them from the cache."""
        config, store = self.config, self.data.store

        def loader(epochs: float | None, ref_logp: np.ndarray | None = None) -> PackLoader:
            return PackLoader(
                store,
                pack_length=config.data.pack_length,
                global_batch_packs=config.train.global_batch_packs,
                data_rank=self.parallel.data_rank,
                data_size=self.parallel.data_size,
                seed=config.train.seed,
                share_prefix=config.data.share_prefix,
                epochs=epochs,
                ref_logp=ref_logp,
            )

        def compute() -> np.ndarray:
            logger.info(
                "reference log-probs of %d responses: one forward pass", store.num_responses
            )
            if self.start.resume_from:
                self._load_first_weights(self.chunks)  # the cache was deleted since the run began
            return compute_logps(
                self.chunks, loader(1.0), store.num_responses, self.parallel, on_step=log_tenths
            )

        ref_logp = None
        if self.algorithm.needs_reference and config.algo.reference == "cache":
            key = cache_key(
                self.start.identity, store.key, str(self.dtype), config.data.share_prefix
            )
            path = self.data.cache_dir / f"reference-{key}.npy"
            ref_logp, there = cached_logps(path, store.num_responses, compute, self.parallel)
            logger.info(
                "reference log-probs: %s", "from the cache" if there else "computed and cached"
            )
        return loader(None if config.train.steps else config.train.epochs, ref_logp)

    def _build_online_reference(self) -> OnlineReference | None:
        if not self.algorithm.needs_reference or self.config.algo.reference == "cache":
            return None
        frozen = self._build_model()
        self._load_first_weights(frozen)
        return OnlineReference(frozen, self.parallel)

    def _resume(self) -> int:
        """Restores the run's newest checkpoint. Raises: ValueError when the data is no longer the same."""
        checkpoint = self.start.resume_from
        if checkpoint is None:
            return 0
        saved = read_description(checkpoint)
        if saved.data_key != self.data.store.key or saved.vocab_size != self.vocab_size:
            raise ValueError(
                f"run.dir={self.run_dir} holds another run (its data, tokenizer, template or vocabulary were others); choose another "
                "run.dir, or restore the data settings and files"
            )
        step = self.checkpointer.resume(checkpoint, self.chunks, self.optimizer)
        logger.info("resumed from %s: step %d is done", checkpoint, step)
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
