"""Scores preference pairs with a checkpoint: reward accuracy, margin and NLL, against a reference checkpoint if given.

`nova evaluate CHECKPOINT --data PAIRS`; with `--nproc N` it runs as `python -m nova_sys.evaluate` on every rank.

Margins and rewards are those of the loss that the checkpoint was trained with (`algo` in its config.toml; another one by --set
algo.loss=...). Without a reference its log-probs count as 0, so that every model has a reward accuracy. NLL is the sum over all
tokens of the answers divided by their number, as the loss of SFT is, so a long answer weighs more than a short one.

Intervals are 95% and take pairs as independent: Wilson's for the accuracy, which stays inside [0, 1] and has a width when every pair
is right, the normal one for means, and for NLL that of a ratio of two means.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nova_kernels import preference_loss
from nova_sys.config import REFERENCE_FREE_LOSSES, AlgoConfig, RunConfig
from nova_sys.data.formats import expand_files
from nova_sys.data.loader import PackLoader
from nova_sys.data.prepare import prepare_data
from nova_sys.data.token_store import StoreReport, TokenStore
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.errors import ToldStop, exit_on_user_error
from nova_sys.inference import load_model
from nova_sys.log import current_rank, setup_logging
from nova_sys.outputs import refuse_output, whole_file
from nova_sys.parallel import (
    Parallel,
    current_world_size,
    main_rank_first,
    parallel_run,
    shared_scratch,
)
from nova_sys.reference import compute_logps
from nova_sys.saved_config import (
    EVALUATE,
    as_toml,
    config_for,
    files_of,
    rows_of_vocabulary,
    tokenizer_of,
)

logger = logging.getLogger(__name__)

Z_95 = 1.959964
"""Quantile of the normal distribution that leaves 2.5% on either side."""
_DOCUMENTS_PER_BLOCK = 65536
TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% confidence interval; from a single value the interval of a mean is NaN."""

    mean: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, values: np.ndarray) -> Estimate:
        return cls.of_ratio(values, np.ones_like(values))

    @classmethod
    def of_ratio(cls, sums: np.ndarray, counts: np.ndarray) -> Estimate:
        """sum(sums) / sum(counts), whose spread is that of the residuals sums - ratio * counts."""
        ratio, n = float(sums.sum() / counts.sum()), len(sums)
        residual = sums - ratio * counts
        variance = float(residual @ residual) * n / (n - 1) if n > 1 else math.nan
        half_width = Z_95 * math.sqrt(variance) / float(counts.sum())
        return cls(ratio, ratio - half_width, ratio + half_width)

    @classmethod
    def of_share(cls, right: np.ndarray) -> Estimate:
        """Wilson's interval (1927); `right` holds 1, 0, or 1/2 for a tie."""
        share, n = float(right.mean()), len(right)
        widening = 1 + Z_95**2 / n
        middle = (share + Z_95**2 / (2 * n)) / widening
        half_width = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n)) / widening
        return cls(share, max(middle - half_width, 0.0), min(middle + half_width, 1.0))

    def __str__(self) -> str:
        interval = "one pair" if math.isnan(self.low) else f"{self.low:.4f} to {self.high:.4f}"
        return f"{self.mean:.4f} ({interval})"


@dataclass(frozen=True)
class Evaluation:
    """reward_accuracy: share of pairs with a positive margin (a tie is half right). margin: mean difference of the two rewards.
    chosen_nll, rejected_nll: nats per token over all tokens of those answers. report: what became of the records."""

    num_pairs: int
    reward_accuracy: Estimate
    margin: Estimate
    chosen_nll: Estimate
    rejected_nll: Estimate
    algo: AlgoConfig
    report: StoreReport


def evaluate_pairs(
    checkpoint: str | Path,
    data: str | Path | Sequence[str],
    reference: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    per_pair: Path | None = None,
    with_ids: bool = False,
) -> Evaluation:
    """Called on every rank of the job (one, unless started otherwise); the result is the same on all of them.

    Args:     data: preference files in any accepted format. overrides: `key=value`, e.g. "parallel.tensor=2".
              per_pair: JSON-lines file, see `pair_rows` (main rank writes it, whole or not at all); with_ids adds the token ids.
    Raises:   ValueError for a bad checkpoint, layout or file, or a reference with other token ids; ToldStop when a log-prob is not
              finite.
    """
    files = [str(data)] if isinstance(data, (str, Path)) else [str(path) for path in data]
    for_pairs = [f"data.train={as_toml(files)}", 'algo.name="dpo"']
    world_size = current_world_size()
    folder, config = config_for(EVALUATE, checkpoint, overrides, world_size, for_pairs)
    ref_folder, ref_config = config_for(
        EVALUATE, reference or checkpoint, overrides, world_size, for_pairs
    )
    if per_pair is not None:
        inputs = [*expand_files(files), *files_of(folder), *files_of(ref_folder)]
        refuse_output("--per-pair", per_pair, inputs)
    with (
        parallel_run(config.parallel, seed=config.train.seed) as parallel,
        shared_scratch(parallel) as scratch,
    ):
        config = replace(  # the training run's folder is only read
            config,
            run=replace(config.run, dir=str(scratch / "run")),
            data=replace(config.data, cache_dir=str(scratch)),
        )
        prepared = main_rank_first(parallel, lambda: prepare_data(config, verify=parallel.is_main))
        _refuse_other_ids(prepared.tokenizer, ref_folder, ref_config)
        store = prepared.store
        logp_B, ref_logp_B = _score(folder, config, store, parallel), None
        if reference is not None:
            ref_config = replace(config, model=ref_config.model)
            ref_logp_B = _score(ref_folder, ref_config, store, parallel)
        tokens_B = answer_tokens(store)
        if per_pair is not None and parallel.is_main:
            rows = pair_rows(store, logp_B, ref_logp_B, tokens_B, with_ids=with_ids)
            with whole_file("--per-pair", per_pair) as out:
                out.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        return _summary(config.algo, store.report, logp_B, ref_logp_B, tokens_B)


def _refuse_other_ids(tokenizer: Tokenizer, reference: Path, config: RunConfig) -> None:
    """Raises: ValueError when the reference's weights do not know the ids that the checkpoint's tokenizer gives."""
    problem = tokenizer.conflict_with(load_tokenizer(tokenizer_of(reference)))
    num_rows = rows_of_vocabulary(reference, config)
    if problem is None and tokenizer.vocab_size > num_rows:
        problem = f"{tokenizer.vocab_size} ids in the one, rows for {num_rows} in the other"
    if problem is not None:
        raise ValueError(
            f"--reference {reference}: was trained with another tokenizer than the checkpoint ({problem}); an id must keep its "
            "meaning. Name a reference with the same tokenizer"
        )


def _score(folder: Path, config: RunConfig, store: TokenStore, parallel: Parallel) -> np.ndarray:
    """Summed log-prob of every answer, (num_responses,) fp64, nats."""
    loader = PackLoader(
        store,
        pack_length=config.data.pack_length,
        # enough micro-batches to fill the pipeline
        global_batch_packs=parallel.data_size * parallel.pipeline_size,
        data_rank=parallel.data_rank,
        data_size=parallel.data_size,
        seed=config.train.seed,
        share_prefix=config.data.share_prefix,
        epochs=1.0,
    )
    chunks = load_model(folder, config, parallel)
    logp_B = compute_logps(
        chunks, loader, store.num_responses, parallel, on_step=partial(_tell, folder, [time.time()])
    )
    faulty = np.flatnonzero(~np.isfinite(logp_B))
    if len(faulty):
        raise ToldStop(
            f"{folder} gives {len(faulty)} of {len(logp_B)} answers a log-prob that is not finite, first at "
            f"{store.source_of(int(faulty[0]) // 2)}; its weights are damaged, or their activations overflow (try --set "
            'train.precision="fp32")'
        )
    return logp_B


def _tell(folder: Path, last_s: list[float], done: int, total: int) -> None:
    """A line every now and then."""
    if time.time() - last_s[0] > TELL_EVERY_S:
        last_s[0] = time.time()
        logger.info("evaluate: %d%% of the answers by %s", 100 * done // total, folder)


def answer_tokens(store: TokenStore) -> np.ndarray:
    """int64 (num_responses,): how many tokens are in each answer's sum. The first token of all is in none: nothing predicts it."""
    tokens_B = np.empty(store.num_responses, np.int64)
    for start in range(0, store.num_documents, _DOCUMENTS_PER_BLOCK):
        stop = min(start + _DOCUMENTS_PER_BLOCK, store.num_documents)
        offsets = store.part_offsets[3 * start : 3 * stop + 1]
        loss = np.asarray(store.loss[offsets[0] : offsets[-1]])
        first = offsets - offsets[0]
        before = np.concatenate([[0], np.cumsum(loss, dtype=np.int64)])
        in_part = np.diff(before[first]).reshape(-1, 3)
        no_prefix = np.diff(first).reshape(-1, 3)[:, 0] == 0
        answers = in_part[:, 1:] - no_prefix[:, None] * loss[first[:-1].reshape(-1, 3)[:, 1:]]
        tokens_B[2 * start : 2 * stop] = answers.reshape(-1)
    return tokens_B


def pair_rows(
    store: TokenStore,
    logp_B: np.ndarray,
    ref_logp_B: np.ndarray | None,
    tokens_B: np.ndarray,
    *,
    with_ids: bool,
) -> Iterator[dict[str, Any]]:
    """Per pair, in input order: where it stands (records that cannot be used have no row), summed log-probs in nats and token counts
    of both answers, the reference's sums if there is one, and the ids on request."""
    for document in range(store.num_documents):
        file, line = store.source[document]
        chosen, rejected = 2 * document, 2 * document + 1
        row: dict[str, Any] = {
            "chosen_logp": float(logp_B[chosen]),
            "rejected_logp": float(logp_B[rejected]),
            "chosen_tokens": int(tokens_B[chosen]),
            "rejected_tokens": int(tokens_B[rejected]),
        }
        if ref_logp_B is not None:
            row["ref_chosen_logp"] = float(ref_logp_B[chosen])
            row["ref_rejected_logp"] = float(ref_logp_B[rejected])
        row |= {"file": store.meta["files"][file]["path"], "line": int(line)}
        if with_ids:
            for i, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids")):
                row[name] = store.part(3 * document + i).tokens.tolist()
        yield row


def _summary(
    algo: AlgoConfig,
    report: StoreReport,
    logp_B: np.ndarray,
    ref_logp_B: np.ndarray | None,
    tokens_B: np.ndarray,
) -> Evaluation:
    rewards = preference_loss(
        torch.from_numpy(logp_B),
        torch.from_numpy(np.zeros_like(logp_B) if ref_logp_B is None else ref_logp_B),
        torch.from_numpy(tokens_B),
        beta=algo.beta,
        loss=algo.loss,
        label_smoothing=algo.label_smoothing,
        target_margin=algo.target_margin,
        length_normalize=algo.length_normalize,
    )
    margin_P = rewards.margin_P.numpy()
    return Evaluation(
        num_pairs=len(margin_P),
        reward_accuracy=Estimate.of_share((margin_P > 0) + 0.5 * (margin_P == 0)),
        margin=Estimate.of_mean(margin_P),
        chosen_nll=Estimate.of_ratio(-logp_B[0::2], tokens_B[0::2]),
        rejected_nll=Estimate.of_ratio(-logp_B[1::2], tokens_B[1::2]),
        algo=algo,
        report=report,
    )


def summary_text(result: Evaluation, reference: str | None) -> str:
    algo, report = result.algo, result.report
    against = f"against {reference}" if reference else "without a reference"
    if algo.loss in REFERENCE_FREE_LOSSES:
        against = "which reads no reference"
    left_out = [f"{n:,} {why}" for why, n in sorted(report.skipped.items())]
    cut = report.truncated.get("documents", 0)
    notes = [f"left out: {', '.join(left_out)}"] if left_out else []
    notes += [f"{cut:,} cut to length"] if cut else []
    return "\n".join(
        [
            f"pairs            {result.num_pairs:,} of {report.num_records:,} records"
            + (f" ({'; '.join(notes)})" if notes else ""),
            f"reward accuracy  {result.reward_accuracy}",
            f"margin           {result.margin}   {algo.loss}, beta {algo.beta:g}, {against}",
            f"chosen NLL       {result.chosen_nll} nats/token, over all tokens of these answers",
            f"rejected NLL     {result.rejected_nll} nats/token",
            "                 in brackets: 95% confidence intervals",
        ]
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m nova_sys.evaluate", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, action="append")
    parser.add_argument("--reference")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--per-pair", type=Path)
    parser.add_argument("--with-ids", action="store_true")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        setup_logging()
        result = evaluate_pairs(
            args.checkpoint,
            args.data,
            args.reference,
            overrides=args.set,
            per_pair=args.per_pair,
            with_ids=args.with_ids,
        )
        if current_rank() == 0:
            print(summary_text(result, args.reference))


if __name__ == "__main__":
    main(sys.argv[1:])
