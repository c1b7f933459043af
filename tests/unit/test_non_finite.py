"""Steps that are not finite: named exactly, and skipped without a trace in weights and optimizer."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nova_kernels.testing import run_ranks
from nova_sys.algo.base import LossOutput
from nova_sys.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)
from nova_sys.errors import is_user_error
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.step import MAX_GRADIENT_SQUARE, gradient_square
from nova_sys.trainer import Trainer

POISONED = 8
"""The only document whose text has a z; its step is the third."""


def write_pairs(path: Path) -> Path:
    rng = random.Random(3)
    with path.open("w") as out:
        for document in range(40):
            words = ["".join(" " + rng.choice("abcdef") for _ in range(n)) for n in (5, 6, 9)]
            words[2] += " zz" * (document == POISONED)
            pair = dict(zip(("prompt", "chosen", "rejected"), words, strict=True))
            out.write(json.dumps(pair) + "\n")
    return path


def make_config(data: Path, run_dir: Path, *, non_finite: str = "skip", **train: Any) -> RunConfig:
    return RunConfig(
        run=RunSection(dir=str(run_dir)),
        model=ModelConfig(
            num_layers=1,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=300,
        ),
        data=DataConfig(train=str(data), pack_length=128),
        train=TrainConfig(**{"steps": 4, "global_batch_packs": 2, **train}, non_finite=non_finite),  # pyright: ignore[reportArgumentType]
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=0, asynchronous=False),
        log=LogConfig(tensorboard=False, progress=False),
    )


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        torch.set_num_threads(1)  # more only wait for each other on models so small
        yield joined


@pytest.fixture
def make_trainer(tmp_path: Path, parallel: Parallel) -> Callable[..., Trainer]:
    data = write_pairs(tmp_path / "pairs.jsonl")

    def make(**changes: Any) -> Trainer:
        return Trainer(make_config(data, tmp_path / "run", **changes), parallel)

    return make


def poison(trainer: Trainer) -> None:
    """NaN into the embedding of the tokens that only document POISONED has, on the rank that holds them."""
    store = trainer.data.store
    tokens = [
        {int(t) for i in range(3) for t in store.part(3 * document + i).tokens}
        for document in range(store.num_documents)
    ]
    others = set().union(*(found for d, found in enumerate(tokens) if d != POISONED))
    own = tokens[POISONED] - others
    assert own
    for chunk in trainer.chunks:
        if not hasattr(chunk, "embedding"):
            continue  # another pipeline stage
        words = chunk.embedding.word_embeddings
        for token in own:
            if words.vocab_start_index <= token < words.vocab_end_index:
                with torch.no_grad():
                    words.weight[token - words.vocab_start_index] = float("nan")
    trainer.optimizer.reload_model_params()


def step_with(trainer: Trainer, document: int) -> int:
    """The first step that sees the document, counted from 0."""
    loader = trainer.loader
    return next(s for s in range(99) if any(document in pack for pack in loader.documents_of(s)))


def state_of(trainer: Trainer) -> dict[str, bytes]:
    """Weights, main weights, moments and step counts, as bytes."""
    tensors = {f"p{i}": p for c in trainer.chunks for i, p in enumerate(c.parameters())}
    for part, optimizer in enumerate(trainer.optimizer.chained_optimizers):
        params = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        tensors |= {f"main{part}.{i}": p for i, p in enumerate(params)}
        for i, values in enumerate(optimizer.optimizer.state.values()):
            tensors |= {f"state{part}.{i}.{name}": value for name, value in values.items()}
    return {name: tensor.detach().float().numpy().tobytes() for name, tensor in tensors.items()}


def watch_states(trainer: Trainer) -> list[dict[str, bytes]]:
    """The state before the first step and after each, filled in as the run goes on."""
    states, one_step = [state_of(trainer)], trainer._one_step

    def observed(step: int) -> None:
        one_step(step)
        states.append(state_of(trainer))

    trainer._one_step = observed
    return states


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    ]


class Meddling:
    """An algorithm whose result for the pack with one document is changed."""

    def __init__(
        self,
        inner: Any,
        change: Callable[[LossOutput, torch.Tensor], LossOutput],
        document: int = POISONED,
    ) -> None:
        self._inner, self._change, self._document = inner, change, document

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def loss(self, logp_R: torch.Tensor, pack: Any) -> LossOutput:
        out = self._inner.loss(logp_R, pack)
        hit = self._document in pack.document_P.tolist()
        return self._change(out, logp_R) if hit else out


def undefined_gradient(out: LossOutput, logp_R: torch.Tensor) -> LossOutput:
    nothing = (0 * logp_R.sum()).abs().sqrt()  # 0, with gradient 0 * infinity
    return replace(out, loss_sum=out.loss_sum + nothing)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_leaves_no_trace(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    trainer = make_trainer(precision=precision)
    bad = step_with(trainer, POISONED)
    poison(trainer)
    states = watch_states(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    for step in range(4):
        assert (states[step] == states[step + 1]) == (step == bad), step
    rows = rows_of(trainer)
    assert [row["skipped"] for row in rows] == [int(step == bad) for step in range(4)]
    assert rows[bad]["loss"] is None and rows[bad]["grad_norm"] is None
    assert rows[bad]["num_pairs"] == 0
    assert all(np.isfinite(row["loss"]) for row in rows if not row["skipped"])
    (message,) = [r.message for r in caplog.records if "skipped" in r.message]
    assert f"step {bad + 1}: the loss is nan" in message
    assert f"{POISONED} (" in message and f"pairs.jsonl:{POISONED + 1})" in message
    for row in rows:  # the learning rate is a function of the step's number
        assert row["lr"] == pytest.approx(make_lr(trainer, row["step"] - 1), rel=1e-12)


def make_lr(trainer: Trainer, steps_done: int) -> float:
    schedule = trainer.schedule
    schedule.num_steps = steps_done
    return schedule.get_lr(trainer.optimizer.param_groups[0])


def test_the_pack_and_the_document_are_named(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(non_finite="stop")
    bad = step_with(trainer, POISONED)
    poison(trainer)
    packs = trainer.loader.documents_of(bad)
    number = next(i for i, pack in enumerate(packs) if POISONED in pack)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    assert is_user_error(stopped.value)  # told in red, without a traceback per rank
    message = str(stopped.value)
    assert f"step {bad + 1}: the loss is nan" in message
    assert f"At fault: pack {2 * bad + number} of epoch 0 (data rank 0, micro-batch" in message
    exactly = f"1 of its {len(packs[number])} documents with a log-prob that is not finite: "
    assert f"{exactly}{POISONED} (" in message
    assert message.count("pairs.jsonl:") == 1
    assert len(rows_of(trainer)) == bad


def test_after_a_stop_the_run_resumes(make_trainer: Callable[..., Trainer]) -> None:
    """The save under way when the fault came is whole; the same run, told to skip, gets over the step."""
    trainer = make_trainer(non_finite="stop")
    asynchronous = replace(trainer.config.checkpoint, every_steps=2, asynchronous=True)
    trainer.config = replace(trainer.config, checkpoint=asynchronous)
    trainer.checkpointer.config = asynchronous
    poison(trainer)
    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.train()
    saved = [path.name for path in (trainer.run_dir / "checkpoints").iterdir()]
    assert saved == ["step_00000002"]
    again = make_trainer()
    assert again.start_step == 2
    again.train()
    assert [(row["step"], row["skipped"]) for row in rows_of(again)] == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 0),
    ]


def test_a_gradient_fault_is_traced_to_its_pack(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(non_finite="stop")
    trainer.algorithm = Meddling(trainer.algorithm, undefined_gradient)
    bad = step_with(trainer, POISONED)
    before = watch_states(trainer)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    assert state_of(trainer) == before[bad]
    message = str(stopped.value)
    assert f"step {bad + 1}: a gradient is not finite (the loss is 0." in message
    packs = trainer.loader.documents_of(bad)
    number = next(i for i, pack in enumerate(packs) if POISONED in pack)
    assert f"At fault: pack {2 * bad + number} of epoch 0" in message
    assert f"its {len(packs[number])} documents: " in message
    assert message.count(" of epoch ") == 1
    assert trainer.mcore_config.finalize_model_grads_func is not None  # as it was


def test_a_gradient_fault_that_does_not_come_again(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(non_finite="stop")
    weight, faults = trainer.chunks[0].decoder.final_layernorm.weight, [float("inf")]
    handle = weight.register_hook(lambda grad: grad * faults.pop() if faults else grad)
    with pytest.raises(FloatingPointError, match="No pack of this step gives such a gradient"):
        trainer.train()
    handle.remove()


def test_a_metric_that_is_not_finite_is_a_fault(make_trainer: Callable[..., Trainer]) -> None:
    """A rejected answer of probability 0 has margin infinity and loss 0: finite, and nonsense."""

    def certain(out: LossOutput, logp_R: torch.Tensor) -> LossOutput:
        metrics = out.metric_sums.clone()
        metrics[2], metrics[6] = float("inf"), -float("inf")
        return replace(out, metric_sums=metrics)

    trainer = make_trainer(non_finite="stop")
    trainer.algorithm = Meddling(trainer.algorithm, certain)
    with pytest.raises(FloatingPointError, match="the margin is inf; weights and optimizer are as"):
        trainer.train()


def test_megatron_refusing_the_step_is_not_silent(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(non_finite="stop")
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (False, None, None))
    with pytest.raises(FloatingPointError, match="step 1: a gradient is not finite"):
        trainer.train()


def test_ten_skips_in_a_row_stop_the_run(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(steps=12)
    with torch.no_grad():
        trainer.chunks[0].decoder.final_layernorm.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 10: .*This is skipped step 10 in a row"):
        trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(row["skipped"] == 1 and row["loss"] is None for row in rows)


def test_the_first_loss_is_checked_at_the_first_step_that_is_not_skipped(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer()
    trainer.loader._ref_logp = trainer.loader._ref_logp + 0.01 * np.arange(80)
    norm = trainer.chunks[0].decoder.final_layernorm.weight
    faults = [float("nan")] * 3  # the step, and its two packs run again
    handle = norm.register_hook(lambda grad: grad * faults.pop() if faults else grad)
    with pytest.raises(RuntimeError, match="from ln 2"):
        trainer.train()
    handle.remove()
    assert [row["skipped"] for row in rows_of(trainer)] == [1]


def test_skipped_steps_are_counted_across_a_resume(make_trainer: Callable[..., Trainer]) -> None:
    """Else the first loss would not be checked any more, and ten steps in a row would be twenty."""
    trainer = make_trainer(steps=2)
    norm = trainer.chunks[0].decoder.final_layernorm.weight
    handle = norm.register_hook(lambda grad: grad * float("nan"))
    trainer.train()
    handle.remove()
    again = make_trainer(steps=4)
    assert (again.start_step, again.skipped_in_a_row) == (2, 2)
    again.loader._ref_logp = again.loader._ref_logp + 0.01 * np.arange(80)
    with pytest.raises(Exception, match="from ln 2"):
        again.train()


def test_a_gradient_too_large_for_the_norm_counts_as_not_finite() -> None:
    """Each rank's norm fits into fp32, the sum of their squares does not: clipping would make all gradients zero."""
    buffer = SimpleNamespace(grad_data=torch.tensor([1.5e19]))
    chunk = SimpleNamespace(buffers=[buffer], expert_parallel_buffers=[])
    assert torch.isfinite(gradient_square(chunk)) and gradient_square(chunk) < MAX_GRADIENT_SQUARE
    assert 2 * gradient_square(chunk) > MAX_GRADIENT_SQUARE
    chunk.buffers = [SimpleNamespace(grad_data=torch.tensor([float("nan")]))]
    assert not gradient_square(chunk) <= MAX_GRADIENT_SQUARE


LAYOUTS = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {},
}


def run_layouts(rank: int, data: str, folder: str) -> list[dict[str, Any]]:
    """`run_ranks` worker: on every layout, one document gives a loss that is not finite, another one such a gradient."""
    import nova_sys.trainer as module

    explain, found = module.explain_non_finite, []
    for name, layout in LAYOUTS.items():
        config = make_config(Path(data), Path(folder) / name)
        config = replace(config, model=replace(config.model, num_layers=4))
        config = replace(config, parallel=ParallelConfig(**layout))
        messages: list[str] = []
        module.explain_non_finite = lambda *args, told=messages, **rest: (
            told.append(explain(*args, **rest)) or told[-1]
        )
        with parallel_run(config.parallel, seed=1) as parallel:
            trainer = Trainer(config, parallel)
            poison(trainer)
            loss_step = step_with(trainer, POISONED)
            other = next(d for d in range(40) if step_with(trainer, d) != loss_step)
            trainer.algorithm = Meddling(trainer.algorithm, undefined_gradient, other)
            states = watch_states(trainer)
            trainer.train()
            same = [a == b for a, b in pairwise(states)]
            gradient_step = step_with(trainer, other)
            packs = trainer.loader.documents_of(gradient_step)
            pack = 2 * gradient_step + next(i for i, p in enumerate(packs) if other in p)
            steps = (loss_step, gradient_step)
            found.append({"steps": steps, "pack": pack, "same": same, "messages": messages})
    module.explain_non_finite = explain
    return found


def test_every_layout_skips_and_names_alike(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    ranks = run_ranks(run_layouts, 2, str(data), str(tmp_path), timeout_s=240)
    for index, name in enumerate(LAYOUTS):
        one, two = (rank[index] for rank in ranks)
        assert one["steps"] == two["steps"]
        by_loss, by_gradient = one["steps"]
        expected = [step in (by_loss, by_gradient) for step in range(4)]
        assert one["same"] == two["same"] == expected, name
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["skipped"] for row in rows] == [int(skip) for skip in expected]
        assert one["messages"] == two["messages"], name
        told = dict(zip(sorted((by_loss, by_gradient)), one["messages"], strict=True))
        assert f"step {by_loss + 1}: the loss is nan" in told[by_loss]
        assert f"that is not finite: {POISONED} (" in told[by_loss]
        assert told[by_loss].count("pairs.jsonl:") == 1
        assert f"step {by_gradient + 1}: a gradient is not finite" in told[by_gradient]
        assert told[by_gradient].count(" of epoch ") == 1
        assert f"At fault: pack {one['pack']} of epoch 0" in told[by_gradient]
