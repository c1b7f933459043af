"""Scores preference pairs with a checkpoint: reward accuracy, margin and NLL, against a reference checkpoint if given.

`nova evaluate CHECKPOINT --data PAIRS`; with `--nproc N` it runs as `python -m nova_sys.evaluate` on every rank.
Without a reference the margin is beta times the plain difference of log-probabilities, so that every model has a reward accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nova_sys.config import RunConfig
from nova_sys.config_io import check
from nova_sys.data.loader import PackLoader
from nova_sys.data.prepare import PreparedData, prepare_data
from nova_sys.errors import exit_on_user_error
from nova_sys.inference import checkpoint_config, load_model
from nova_sys.log import setup_logging
from nova_sys.parallel import (
    Parallel,
    current_world_size,
    main_rank_first,
    parallel_run,
    shared_scratch,
)
from nova_sys.reference import compute_logps


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its 95% confidence interval (normal approximation)."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), 1.96 * spread / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half_width:.4f}"


@dataclass(frozen=True)
class Evaluation:
    """reward_accuracy: share of pairs with a positive margin (a tie is half right).
    margin: beta * difference of log-ratios, nats. chosen_nll: nats per token of the chosen answers."""

    num_pairs: int
    reward_accuracy: Estimate
    margin: Estimate
    chosen_nll: Estimate


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
              per_pair: JSON-lines file, one object per pair in input order (main rank writes it); with_ids adds the token ids.
    Raises:   ValueError for a bad checkpoint, layout or file.
    """
    files = [str(data)] if isinstance(data, (str, Path)) else [str(path) for path in data]
    for_pairs = [f"data.train={json.dumps(files)}", 'algo.name="dpo"', *overrides]
    folder, config = checkpoint_config(checkpoint, for_pairs)
    config = replace(config, train=replace(config.train, global_batch_packs=current_world_size()))
    check(config, current_world_size())
    with (
        parallel_run(config.parallel, seed=config.train.seed) as parallel,
        shared_scratch(parallel) as scratch,
    ):
        config = replace(
            config,
            run=replace(
                config.run, dir=str(scratch / "run")
            ),  # the training run's folder is only read
            data=replace(config.data, cache_dir=str(scratch)),
        )
        data_ = main_rank_first(parallel, lambda: prepare_data(config))
        logp_B = _score(folder, config, data_, parallel)
        ref_logp_B = np.zeros_like(logp_B)
        if reference is not None:
            ref_folder, ref_config = checkpoint_config(reference, for_pairs)
            ref_logp_B = _score(
                ref_folder, replace(config, model=ref_config.model), data_, parallel
            )
        rows = pair_rows(data_, logp_B, with_ids=with_ids)
        if per_pair is not None and parallel.is_main:
            per_pair.write_text("".join(json.dumps(row) + "\n" for row in rows))
        margin_P = (
            config.algo.beta
            * np.diff((ref_logp_B - logp_B).reshape(-1, 2).astype(np.float64))[:, 0]
        )
        nll_P = np.array([-row["chosen_logp"] / max(row["chosen_tokens"], 1) for row in rows])
        return Evaluation(
            num_pairs=len(margin_P),
            reward_accuracy=Estimate.of((margin_P > 0) + 0.5 * (margin_P == 0)),
            margin=Estimate.of(margin_P),
            chosen_nll=Estimate.of(nll_P),
        )


def _score(folder: Path, config: RunConfig, data: PreparedData, parallel: Parallel) -> np.ndarray:
    loader = PackLoader(
        data.store,
        pack_length=config.data.pack_length,
        global_batch_packs=parallel.data_size
        * parallel.pipeline_size,  # enough micro-batches to fill the pipeline
        data_rank=parallel.data_rank,
        data_size=parallel.data_size,
        seed=config.train.seed,
        share_prefix=config.data.share_prefix,
        epochs=1.0,
    )
    model = load_model(folder, config, parallel)
    return compute_logps(model.chunks, loader, data.store.num_responses, parallel)


def pair_rows(data: PreparedData, logp_B: np.ndarray, *, with_ids: bool) -> list[dict[str, Any]]:
    """Per pair, in input order: summed log-probs in nats and token counts of both answers, and the ids on request."""
    store, rows = data.store, []
    for document in range(store.num_documents):
        prefix, chosen, rejected = (store.part(3 * document + i) for i in range(3))
        row: dict[str, Any] = {
            "chosen_logp": float(logp_B[2 * document]),
            "rejected_logp": float(logp_B[2 * document + 1]),
            "chosen_tokens": int(chosen.loss.sum()),
            "rejected_tokens": int(rejected.loss.sum()),
        }
        if with_ids:
            ids = {"prompt_ids": prefix, "chosen_ids": chosen, "rejected_ids": rejected}
            row |= {name: part.tokens.tolist() for name, part in ids.items()}
        rows.append(row)
    return rows


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
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"pairs            {result.num_pairs:,}")
            print(f"reward accuracy  {result.reward_accuracy}")
            print(
                f"margin           {result.margin}   ({'against ' + args.reference if args.reference else 'no reference'})"
            )
            print(f"chosen NLL       {result.chosen_nll} nats/token")


if __name__ == "__main__":
    main(sys.argv[1:])
