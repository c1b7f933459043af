"""Wiring in build order, and the loop. Read `train.py` first, then this, then `step.py`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nova_sys.algo import build_algorithm
from nova_sys.checkpoint import Checkpointer, new_identity
from nova_sys.checkpoint_files import TEMPLATE, Description, describe_model, read_description
from nova_sys.config import RunConfig
from nova_sys.config_io import check_profile, to_toml
from nova_sys.data.batch import Pack
from nova_sys.data.chat import is_template_file
from nova_sys.data.loader import PackLoader
from nova_sys.data.prepare import prepare_data
from nova_sys.errors import ToldStop
from nova_sys.hf.carried import carried_texts
from nova_sys.hf.weights import load_any_weights
from nova_sys.memory import recompute_block
from nova_sys.metrics import StepClock, kv_shift_histograms
from nova_sys.model.build import attention_tile_sizes, build_model, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.model.te import plain_weights, settle_scales
from nova_sys.non_finite import explain_non_finite
from nova_sys.optimizer import build_optimizer, build_schedule, wrap_for_training
from nova_sys.parallel import Parallel, choose_dtype, from_main, main_rank_first, on_any_rank
from nova_sys.profiling import Profiler
from nova_sys.reference import OnlineReference, cache_key, cached_logps, compute_logps, numbers_of
from nova_sys.run_lock import RunLock
from nova_sys.start import claim, find_start, first_weights, run_fields
from nova_sys.step import NonFiniteStep, StepResult, response_logps, train_step
from nova_sys.stopping import StopRequest
from nova_sys.telemetry import Record, Telemetry

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""Steps in a row that may be skipped because they are not finite."""


class Trainer:
    """One run, from its configuration to its last checkpoint."""

    skipped_in_a_row = 0

    def __init__(
        self, config: RunConfig, parallel: Parallel, stop: StopRequest | None = None
    ) -> None:
        self.config, self.parallel = config, parallel
        self.stop = stop or StopRequest()
        self.run_dir = Path(config.run.dir)
        self.lock = RunLock(self.run_dir)
        from_main(parallel, self.lock.acquire)
        self.start = from_main(parallel, lambda: find_start(config), slow=True)
        self.carried = from_main(
            parallel, lambda: carried_texts(self.start.resume_from or self.start.init_from)
        )
        self.dtype = choose_dtype(config.train.precision, parallel.device)
        self.algorithm = build_algorithm(config.algo)
        self.data = main_rank_first(
            parallel,
            lambda: prepare_data(config, self.start.tokenizer_dir, verify=parallel.is_main),
        )
        self.vocab_size = config.model.vocab_size or self.data.tokenizer.vocab_size
        self.mcore_config = self._transformer_config()
        self.chunks = self._build_model()
        if self.start.resume_from is None:
            self._load_first_weights(self.chunks)
        self.loader = self._build_loader()
        self.online = self._build_online_reference()
        self.total_steps = self._count_steps()
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
        self.clock = self._build_clock()
        self.checkpointer = Checkpointer(
            self.run_dir,
            config.checkpoint,
            rank=parallel.rank,
            world_size=parallel.world_size,
            timeout_s=config.parallel.timeout_s,
        )
        self.start_step = self._resume()  # random states too: nothing behind it may draw
        self.schedule = build_schedule(
            self.optimizer, config.optimizer, total_steps=self.total_steps
        )
        self.schedule.step(self.start_step)
        resumes = self.start.resume_from is not None
        from_main(
            parallel,
            lambda: claim(self.run_dir, config, self.data.store.key, resumes=resumes),
        )
        self.telemetry = self._build_telemetry()
        from_main(parallel, self.telemetry.refuse_problem)

    def train(self) -> None:
        """Steps until done, or until a signal asks to stop; then the last checkpoint."""
        config = self.config
        done = self.start_step
        ends = [self.lock.release, self.telemetry.close, self.loader.stop, self.checkpointer.close]
        ends.append(self.clock.close)
        try:
            profiler = Profiler(
                self.run_dir,
                config.log.profile_steps if self.parallel.is_main else None,
                start_step=self.start_step,
            )
            ends.append(profiler.close)
            self.loader.start(self.start_step)
            self.stop.start_training(lambda stops: on_any_rank(self.parallel, stops))
            while done < self.total_steps and not self.stop.agreed:
                self._one_step(done)
                done += 1
                if config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0:
                    self.save(done)
                self.checkpointer.poll()
                self.stop.reason = self.stop.reason or self.telemetry.problem
                profiler.step(done)
            if done > self.start_step:
                self.save(done)
            self.checkpointer.wait()
            if done < self.total_steps:
                logger.info(
                    "stopped by %s after step %d of %d; checkpoint %s; the same command continues",
                    self.stop.reason or "a signal to another rank",
                    done,
                    self.total_steps,
                    self.checkpointer.folder(done),
                )
            elif done == self.start_step:
                logger.info("step %d of %d is already done; nothing to train", done, done)
        finally:
            for end in reversed(ends):
                try:
                    end()
                except Exception:  # the others come to their ends, and what ended the run is told
                    logger.warning("at the end of the run:", exc_info=True)

    def _one_step(self, step: int) -> None:
        watchdog = self.parallel.watchdog
        watchdog.step = step + 1
        began = time.perf_counter()
        with watchdog.phase("data"):
            packs = self.loader.next()
        data_wait_s = time.perf_counter() - began
        if self.online is not None:
            packs = self.online.score(packs)
        unmoved = step == self.skipped_in_a_row  # no step has changed the weights yet
        try:
            result = train_step(
                self.ddp, self.optimizer, packs, self.algorithm, self.parallel, self.stop
            )
        except NonFiniteStep as error:
            self._skip_or_stop(step, packs, error)
            result = None
        else:
            self.skipped_in_a_row = 0
            if unmoved:
                self._check_first_loss(result)
        lr = next(group["lr"] for group in self.optimizer.param_groups)
        self.schedule.step(1)  # also after a skip: the schedule is a function of the step's number
        record = {"step": step + 1, **self._values(result), "lr": lr, "skipped": int(not result)}
        record["epoch"] = (
            (step + 1) * self.config.train.global_batch_packs / self.loader.packs_per_epoch
        )
        with watchdog.phase("metrics"):
            record |= self.clock.record(packs, time.perf_counter() - began, data_wait_s)
            histograms = kv_shift_histograms(self.chunks, self.config, self.parallel, step + 1)
        if self.algorithm.name == "sft":
            del record["pairs_per_s"]
        self.telemetry.step(record, histograms)
        watchdog.warm = True

    def _values(self, result: StepResult | None) -> Record:
        """What the step's record says of loss, gradient and count; nothing of a skipped step."""
        count = self.algorithm.count_name
        if result is None:
            return {**dict.fromkeys([*self.algorithm.metric_names, "grad_norm"]), count: 0}
        return {**result.means, "grad_norm": result.grad_norm, count: result.count}

    def _skip_or_stop(self, step: int, packs: list[Pack], error: NonFiniteStep) -> None:
        """Names what is at fault. Raises: FloatingPointError unless this step is to be skipped. Called on every rank."""
        found = explain_non_finite(
            error,
            step=step,
            chunks=self.ddp,
            packs=packs,
            algorithm=self.algorithm,
            parallel=self.parallel,
            loader=self.loader,
            store=self.data.store,
        )
        self.skipped_in_a_row += 1
        skips = self.config.train.non_finite == "skip"
        if skips and self.skipped_in_a_row < MAX_SKIPPED_STEPS:
            in_a_row = f"{self.skipped_in_a_row} in a row, {MAX_SKIPPED_STEPS} stop the run"
            if self.parallel.is_main:
                logger.warning("%s. The step is skipped (%s)", found, in_a_row)
            return
        how_many = f"This is skipped step {self.skipped_in_a_row} in a row. " if skips else ""
        hint = "" if skips else 'train.non_finite="skip" leaves such steps out; '
        problem = FloatingPointError(
            f"{found}. {how_many}Look at the documents, lower optimizer.lr, or raise optimizer.warmup_steps; {hint}"
            "the same command resumes from the last checkpoint"
        )
        self._end_with(problem)

    def _end_with(self, problem: Exception) -> NoReturn:
        """Raises: `problem`, when the save under way is whole and the run can resume from it; when it failed, both. On every rank."""
        try:
            self.checkpointer.wait()
        except ValueError as another:
            raise type(problem)(f"{problem}. Besides, {another}") from None
        raise problem

    def save(self, step: int) -> None:
        """Called on every rank. Raises: ValueError on every rank when the disk is full; also when it was for the metrics up to here."""
        try:
            from_main(self.parallel, self.telemetry.refuse_problem)
        except ValueError as problem:
            self._end_with(problem)
        description = Description(
            step=step,
            model=describe_model(self.config.model),
            vocab_size=self.vocab_size,
            run=run_fields(self.config),
            data_key=self.data.store.key,
            start_identity=self.start.identity,
            world_size=self.parallel.world_size,
            device=self.parallel.device.type,
            identity=new_identity(),
            skipped_in_a_row=self.skipped_in_a_row,
        )
        with self.parallel.watchdog.phase("save", watched=False):  # a slow disk is no hang
            self.checkpointer.save(
                description,
                self.chunks,
                self.optimizer,
                texts=self._texts(),
                tokenizer_dir=self.data.tokenizer_dir,
            )

    def _texts(self) -> dict[str, str]:
        """What a checkpoint needs besides weights and tokenizer, by the name of its file."""
        texts = {"config.toml": to_toml(self.config), **self.carried}
        if is_template_file(self.config.data.template):
            texts[TEMPLATE] = self.data.store.meta["template"]
        return texts

    # -- building ---------------------------------------------------------------------------------------------------

    def _transformer_config(self) -> TransformerConfig:
        train = self.config.train
        return transformer_config(
            self.config.model,
            self.parallel,
            dtype=self.dtype,
            fp8=self.config.fp8 if train.precision == "fp8" else None,
            recompute=train.recompute,
            recompute_layers=recompute_block(self.config),
            fuse_swiglu=self.parallel.device.type == "cuda",
        )

    def _build_clock(self) -> StepClock:
        return StepClock(
            self.config.model,
            self.parallel,
            vocab_size=self.vocab_size,
            dtype=self.dtype,
        )

    def _build_telemetry(self) -> Telemetry:
        return Telemetry(
            self.run_dir,
            algorithm=self.algorithm.name,
            log=self.config.log,
            start_step=self.start_step,
            total_steps=self.total_steps,
            config_text=to_toml(self.config),
            is_main=self.parallel.is_main,
        )

    def _build_model(self) -> list[PackedGPT]:
        config = self.config
        return build_model(
            config.model,
            self.mcore_config,
            self.parallel,
            vocab_size=self.vocab_size,
            max_positions=config.data.pack_length,
            seed=config.train.seed,
            backend=config.train.kernels,
        )

    def _load_first_weights(self, chunks: list[PackedGPT]) -> None:
        """The weights of step 0 into `chunks`, which are random so far; FP8 scales for them, where layers keep some."""
        folder = from_main(self.parallel, lambda: first_weights(self.start, self.config), slow=True)
        if folder is not None:
            with plain_weights(chunks):
                load_any_weights(folder, chunks, self.config.model, self.vocab_size)
        settle_scales(
            chunks,
            lambda: response_logps(chunks, self._loader(1.0).micro_batches(0), self.parallel),
        )

    def _loader(self, epochs: float | None, ref_logp: np.ndarray | None = None) -> PackLoader:
        config = self.config
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
            tile_sizes=attention_tile_sizes(config.model, self.parallel, config.train.kernels),
        )

    def _build_loader(self) -> PackLoader:
        """The loader, with reference log-probs attached when the algorithm wants them from the cache."""
        config, store = self.config, self.data.store

        def compute() -> np.ndarray:
            logger.info(
                "reference log-probs of %d responses: one forward pass", store.num_responses
            )
            if self.start.resume_from:
                self._load_first_weights(self.chunks)  # the cache was deleted since the run began
            return compute_logps(self.chunks, self._loader(1.0), store.num_responses, self.parallel)

        ref_logp = None
        if self.algorithm.needs_reference and config.algo.reference == "cache":
            numbers = numbers_of(config, self.dtype, self.parallel.data_size)
            key = cache_key(self.start.identity, store.key, numbers, config.data.share_prefix)
            path = self.data.cache_dir / f"reference-{key}.npz"
            ref_logp, there = cached_logps(path, store.num_responses, compute, self.parallel)
            logger.info(
                "reference log-probs: %s", "from the cache" if there else "computed and cached"
            )
        return self._loader(None if config.train.steps else config.train.epochs, ref_logp)

    def _count_steps(self) -> int:
        train = self.config.train
        total_steps = train.steps or self.loader.steps_for(train.epochs)
        check_profile(self.config, total_steps)
        return total_steps

    def _build_online_reference(self) -> OnlineReference | None:
        if not self.algorithm.needs_reference or self.config.algo.reference == "cache":
            return None
        frozen = self._build_model()
        self._load_first_weights(frozen)
        return OnlineReference(frozen, self.parallel, on_host=self.config.algo.reference == "host")

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
        self.skipped_in_a_row = saved.skipped_in_a_row
        step = self.checkpointer.resume(checkpoint, self.chunks, self.optimizer)
        logger.info("resumed from %s: step %d is done", checkpoint, step)
        return step

    def _check_first_loss(self, result: StepResult) -> None:
        """Policy and reference are the same weights at step 0, whose metrics show it when they are not."""
        if not self.config.train.check_first_loss:
            return
        precision = "fp32" if self.dtype == torch.float32 else "bf16"
        problem = self.algorithm.first_step_problem(result.means, precision=precision)
        if problem is not None:
            raise ToldStop(
                f"{problem}. Policy and reference should be equal at step 0. Usual causes: reference log-probs of other weights or "
                "data (delete the cache folder), randomness in the forward pass such as dropout, or a fault in tensor or sequence "
                "parallelism. train.check_first_loss=false turns this check off"
            )
