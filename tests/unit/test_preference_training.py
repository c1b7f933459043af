"""Every `algo.loss` on a real step: the value is the one derived by hand, the first loss is known, and faults show in it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from nova_kernels.preference_loss import LOSSES, PER_TOKEN_LOSSES, SMOOTHED_LOSSES
from nova_sys import metrics
from nova_sys.algo import build_algorithm
from nova_sys.algo.base import sequence_logp, sequence_tokens
from nova_sys.config import (
    REFERENCE_FREE_LOSSES,
    AlgoConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)
from nova_sys.config_io import TYPES
from nova_sys.config_rules import LOSSES_WITH
from nova_sys.errors import ToldStop, is_user_error
from nova_sys.evaluate import answer_tokens
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.reference import compute_logps
from nova_sys.trainer import Trainer

BETA = 0.3
LN_2 = math.log(2.0)


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_odds(mean: float) -> float:
    return mean - math.log(1.0 - math.exp(mean))


# c, r: log-probs of the chosen and the rejected answer; rc, rr: the reference's; nc, nr: tokens
BY_HAND: dict[str, tuple[AlgoConfig, Any]] = {
    "sigmoid": (
        AlgoConfig(beta=BETA),
        lambda c, r, rc, rr, nc, nr: softplus(-BETA * (c - rc - r + rr)),
    ),
    "sigmoid, per token": (
        AlgoConfig(beta=BETA, length_normalize=True),
        lambda c, r, rc, rr, nc, nr: softplus(-BETA * ((c - rc) / nc - (r - rr) / nr)),
    ),
    "sigmoid + NLL": (
        AlgoConfig(beta=BETA, nll_weight=0.7),
        lambda c, r, rc, rr, nc, nr: softplus(-BETA * (c - rc - r + rr)) - 0.7 * c / nc,
    ),
    "conservative": (
        AlgoConfig(loss="conservative", beta=BETA, label_smoothing=0.2),
        lambda c, r, rc, rr, nc, nr: (
            0.8 * softplus(-BETA * (c - rc - r + rr)) + 0.2 * softplus(BETA * (c - rc - r + rr))
        ),
    ),
    "robust": (
        AlgoConfig(loss="robust", beta=BETA, label_smoothing=0.2),
        lambda c, r, rc, rr, nc, nr: (
            (0.8 * softplus(-BETA * (c - rc - r + rr)) - 0.2 * softplus(BETA * (c - rc - r + rr)))
            / 0.6
        ),
    ),
    "hinge": (
        AlgoConfig(loss="hinge", beta=BETA),
        lambda c, r, rc, rr, nc, nr: max(0.0, 1.0 - BETA * (c - rc - r + rr)),
    ),
    "ipo": (
        AlgoConfig(loss="ipo", beta=BETA),
        lambda c, r, rc, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2,
    ),
    "simpo": (
        AlgoConfig(loss="simpo", beta=BETA, target_margin=0.4),
        lambda c, r, rc, rr, nc, nr: softplus(0.4 - BETA * (c / nc - r / nr)),
    ),
    "orpo": (
        AlgoConfig(loss="orpo", beta=BETA),
        lambda c, r, rc, rr, nc, nr: -c / nc + BETA * softplus(log_odds(r / nr) - log_odds(c / nc)),
    ),
}
FIRST_LOSS = {"hinge": 1.0, "ipo": 1 / (4 * BETA**2)}


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with (
        mock.patch.object(metrics, "peak_flops", lambda *_: 1e12),  # else measured for each run
        parallel_run(ParallelConfig(), seed=1) as joined,
    ):
        yield joined


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, parallel: Parallel) -> RunConfig:
    """One step over all of 30 pairs. The reference log-probs of the policy's own first weights are in its cache."""
    folder = tmp_path_factory.mktemp("preference")
    rng = random.Random(3)
    with (folder / "pairs.jsonl").open("w") as out:
        for _ in range(30):
            texts = ["".join(" " + rng.choice("abcdef") for _ in range(n)) for n in (5, 4, 9)]
            out.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))))
            out.write("\n")
    config = RunConfig(
        run=RunSection(dir=str(folder / "first")),
        model=ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=300,
            init_std=0.3,  # log-probs far from uniform
        ),
        data=DataConfig(train=str(folder / "pairs.jsonl"), pack_length=512),
        train=TrainConfig(steps=1, global_batch_packs=2),
        log=LogConfig(tensorboard=False, progress=False),
    )
    trainer = Trainer(config, parallel)
    assert trainer.loader.packs_per_epoch == 2
    cache, tokenizer = str(folder / "first" / "cache"), str(folder / "first" / "tokenizer")
    return replace(config, data=replace(config.data, cache_dir=cache, tokenizer=tokenizer))


def trainer_for(
    config: RunConfig, folder: Path, parallel: Parallel, algo: AlgoConfig, **train: Any
) -> Trainer:
    run = RunSection(dir=str(folder / "run"))
    config = replace(config, run=run, algo=algo, train=replace(config.train, **train))
    trainer = Trainer(config, parallel)
    trainer.save = lambda *_, **__: None  # nobody looks at it
    return trainer


def with_another_reference(config: RunConfig, folder: Path) -> tuple[RunConfig, np.ndarray]:
    """The same run with a cache of reference log-probs that are not those of its weights, and these log-probs."""
    (found,) = Path(config.data.cache_dir).glob("reference-*.npz")
    arrays = dict(np.load(found))
    arrays["logp"] += np.random.default_rng(0).normal(0.0, 2.0, len(arrays["logp"]))
    (folder / "cache").mkdir()
    np.savez(folder / "cache" / found.name, **arrays)
    return replace(config, data=replace(config.data, cache_dir=str(folder / "cache"))), arrays["logp"]  # fmt: skip


def first_record(trainer: Trainer) -> dict[str, float]:
    trainer.train()
    return json.loads((trainer.run_dir / "metrics.jsonl").read_text().splitlines()[0])


def test_every_loss_is_selectable_and_tried_here() -> None:
    selectable = set(TYPES["algo.loss"].__args__)
    assert selectable == set(LOSSES) == {algo.loss for algo, _ in BY_HAND.values()}
    assert LOSSES_WITH["label_smoothing"] == SMOOTHED_LOSSES
    assert set(LOSSES_WITH["length_normalize"]) == set(LOSSES) - set(PER_TOKEN_LOSSES)


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_has_the_value_derived_by_hand(
    tmp_path: Path, config: RunConfig, parallel: Parallel, name: str
) -> None:
    algo, by_hand = BY_HAND[name]
    config, ref_logp = with_another_reference(config, tmp_path)
    trainer = trainer_for(config, tmp_path, parallel, algo, check_first_loss=False)
    store = trainer.data.store
    logp = compute_logps(trainer.chunks, trainer.loader, store.num_responses, parallel)
    tokens = answer_tokens(store)
    columns = [values.reshape(-1, 2)[:, i] for values in (logp, ref_logp, tokens) for i in (0, 1)]
    expected = np.mean([by_hand(*pair) for pair in zip(*columns, strict=True)])
    record = first_record(trainer)
    assert record["loss"] == pytest.approx(expected, rel=1e-6)
    assert record["num_pairs"] == 30
    if name != "sigmoid":
        sigmoid = np.mean([BY_HAND["sigmoid"][1](*pair) for pair in zip(*columns, strict=True)])
        assert abs(record["loss"] - sigmoid) > 1e-2


@pytest.mark.parametrize("name", BY_HAND)
def test_first_loss_is_known(
    tmp_path: Path, config: RunConfig, parallel: Parallel, name: str
) -> None:
    """With the policy's own first weights as the reference, and the check that stops the run switched on."""
    algo, _ = BY_HAND[name]
    trainer = trainer_for(config, tmp_path, parallel, algo)
    record = first_record(trainer)
    if algo.loss in REFERENCE_FREE_LOSSES:
        assert not trainer.algorithm.needs_reference and "drift" not in record
    else:
        at_zero = FIRST_LOSS.get(algo.loss, LN_2) + algo.nll_weight * record["nll"]
        expected = trainer.algorithm.expected_first_loss(record)
        assert expected == pytest.approx(at_zero, rel=1e-12)
        assert record["loss"] == pytest.approx(at_zero, rel=1e-6)
        assert record["margin"] == record["drift"] == 0 and record["reward_accuracy"] == 0.5


@pytest.mark.parametrize("loss", REFERENCE_FREE_LOSSES)
def test_no_reference_is_computed_for_a_loss_that_reads_none(
    tmp_path: Path, config: RunConfig, parallel: Parallel, loss: Any
) -> None:
    config = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache")))
    record = first_record(trainer_for(config, tmp_path, parallel, AlgoConfig(loss=loss)))
    assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert names and not any(name.startswith("reference") for name in names)


def test_gradient_is_that_of_the_value_by_hand(config: RunConfig, parallel: Parallel) -> None:
    """dloss/dlogp of every row of a real pack, against finite differences of the formulas above."""
    pack = Trainer(config, parallel).loader.micro_batches(0)[0].to("cpu")
    generator = torch.Generator().manual_seed(0)
    logp_R = -3.0 * torch.rand(len(pack.row_R), generator=generator, dtype=torch.float64) - 0.1
    noise_B = torch.randn(len(pack.response_B), generator=generator, dtype=torch.float64)
    logp_B, tokens_B = sequence_logp(logp_R, pack), sequence_tokens(pack)
    pack = replace(pack, ref_logp_B=logp_B + noise_B)
    gradients = []
    for algo, by_hand in BY_HAND.values():
        logp_R.requires_grad_(True).grad = None
        build_algorithm(algo).loss(logp_R, pack).loss_sum.backward()
        assert logp_R.grad is not None
        values = [v.tolist() for v in (logp_B.detach(), pack.ref_logp_B, tokens_B)]
        for p in range(len(tokens_B) // 2):
            pair = [v[2 * p + i] for v in values for i in (0, 1)]
            for i in (0, 1):  # the chosen answer, then the rejected one
                up, down = ([*pair[:i], pair[i] + h, *pair[i + 1 :]] for h in (1e-6, -1e-6))
                expected = (by_hand(*up) - by_hand(*down)) / 2e-6
                of_rows = logp_R.grad[pack.sequence_R == 2 * p + i]
                assert of_rows.tolist() == pytest.approx([expected] * len(of_rows), rel=1e-5, abs=1e-8)  # fmt: skip
        gradients.append(logp_R.grad.clone())
    for i, one in enumerate(gradients):
        assert not any(torch.allclose(one, other) for other in gradients[:i])


# -- what the first loss reveals: a broken tensor-parallel reduction is in tests/distributed/test_layouts.py ----------------


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid + NLL", "ipo", "hinge"])
def test_another_models_reference_stops_the_run(
    tmp_path: Path, config: RunConfig, parallel: Parallel, name: str
) -> None:
    config, _ = with_another_reference(config, tmp_path)
    trainer = trainer_for(config, tmp_path, parallel, BY_HAND[name][0])
    with pytest.raises(ToldStop, match="reference log-probs of other weights"):
        trainer.train()


@pytest.mark.parametrize("beta", [0.1, 1e-3])
@pytest.mark.parametrize("loss", sorted({*LOSSES} - {*REFERENCE_FREE_LOSSES}))
def test_reference_in_another_order_stops_the_run(
    tmp_path: Path, config: RunConfig, parallel: Parallel, loss: Any, beta: float
) -> None:
    """The cache of the same weights, for the same answers in another order: in the mean of a loss that is linear at 0 nothing shows."""
    (found,) = Path(config.data.cache_dir).glob("reference-*.npz")
    arrays = dict(np.load(found))
    arrays["logp"] = arrays["logp"].reshape(-1, 2)[::-1].reshape(-1)
    (tmp_path / "cache").mkdir()
    np.savez(tmp_path / "cache" / found.name, **arrays)
    config = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache")))
    smoothing = 0.1 if loss in SMOOTHED_LOSSES else 0.0
    algo = AlgoConfig(loss=loss, beta=beta, label_smoothing=smoothing)
    with pytest.raises(ToldStop, match=r"Policy and reference should be equal") as told:
        trainer_for(config, tmp_path, parallel, algo).train()
    assert is_user_error(told.value)  # told in red, without a traceback per rank


def test_what_rounding_may_do_does_not_stop_a_run(config: RunConfig) -> None:
    """Two passes of the same weights in bf16 differ by what bf16 differs from fp32, at most."""
    algorithm = build_algorithm(config.algo)
    means = dict.fromkeys(algorithm.metric_names, 0.0)
    means |= {"loss": LN_2, "chosen_logp": -500.0, "rejected_logp": -400.0}
    for precision, drift in (("fp32", 1e-3), ("bf16", 1.0)):
        found = [{**means, "drift": value} for value in (drift, 10 * drift, math.nan)]
        told = [algorithm.first_step_problem(m, precision=precision) is not None for m in found]
        assert told == [False, True, True]


@pytest.mark.parametrize("reference", ["cache", "online"])
def test_noise_in_the_forward_pass_stops_the_run(
    tmp_path: Path, config: RunConfig, parallel: Parallel, reference: Any
) -> None:
    """What dropout that was left on would do to the policy."""
    trainer = trainer_for(config, tmp_path, parallel, AlgoConfig(reference=reference))
    generator = torch.Generator().manual_seed(0)

    def drop(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        keep = torch.rand(embedded.shape, generator=generator) > 0.1
        return embedded * keep / 0.9

    trainer.chunks[0].embedding.register_forward_hook(drop)
    with pytest.raises(RuntimeError, match="randomness in the forward pass such as dropout"):
        trainer.train()


def test_the_check_can_be_turned_off(tmp_path: Path, config: RunConfig, parallel: Parallel) -> None:
    config, _ = with_another_reference(config, tmp_path)
    trainer = trainer_for(config, tmp_path, parallel, AlgoConfig(), check_first_loss=False)
    assert abs(first_record(trainer)["loss"] - LN_2) > 1e-2
