"""A step that is not finite stops the run before any weight changes, and says where to look."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nova_sys.config import (
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.trainer import Trainer


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        yield joined


@pytest.fixture
def trainer(tmp_path: Path, parallel: Parallel) -> Trainer:
    rng = random.Random(3)
    path = tmp_path / "pairs.jsonl"
    with path.open("w") as out:
        for _ in range(40):
            words = ["".join(" " + rng.choice("abcdef") for _ in range(n)) for n in (5, 6, 9)]
            out.write(
                json.dumps(dict(zip(("prompt", "chosen", "rejected"), words, strict=True))) + "\n"
            )
    config = RunConfig(
        run=RunSection(dir=str(tmp_path / "run")),
        model=ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=300,
        ),
        data=DataConfig(train=str(path), pack_length=128),
        train=TrainConfig(steps=2, global_batch_packs=2),
        log=LogConfig(tensorboard=False, progress=False),
    )
    return Trainer(config, parallel)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in trainer.chunks for p in chunk.parameters()]


def test_nan_in_the_forward_pass_names_step_and_documents(trainer: Trainer) -> None:
    norm = trainer.chunks[0].decoder.final_layernorm.weight
    with torch.no_grad():
        norm[3] = float("nan")
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan.*pairs\.jsonl:\d+"):
        trainer.train()
    for old, new in zip(before, weights(trainer), strict=True):
        assert torch.equal(old, new) or (
            old.isnan().any() and torch.equal(old.nan_to_num(), new.nan_to_num())
        )


def test_infinite_gradient_stops_before_the_update(trainer: Trainer) -> None:
    norm = trainer.chunks[0].decoder.final_layernorm.weight
    handle = norm.register_hook(lambda grad: grad * float("inf"))
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="a gradient is not finite"):
        trainer.train()
    handle.remove()
    assert all(torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))


def test_the_same_run_trains_without_the_fault(trainer: Trainer) -> None:
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))


def test_a_wrong_reference_stops_at_the_first_step(trainer: Trainer) -> None:
    trainer.loader._ref_logp = (
        trainer.loader._ref_logp + 0.01 * torch.arange(len(trainer.loader._ref_logp)).numpy()
    )
    with pytest.raises(RuntimeError, match="from ln 2"):
        trainer.train()
