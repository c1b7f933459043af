"""The toy tasks' sequences, their way through the data layer, and a training run that learns one with KV shifting only."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nova_sys.config import (
    AlgoConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)
from nova_sys.data.induction import (
    ToyFiles,
    induction_sequence,
    trigram_sequence,
    trigram_table,
    turns,
    write_induction,
    write_trigrams,
)
from nova_sys.data.prepare import prepare_data
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.trainer import Trainer

ROOT = Path(__file__).parents[2]
SMALL: dict[str, int] = {"num_eval": 5, "length": 24, "num_ids": 8}


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        torch.set_num_threads(1)
        yield joined


def config_for(files: ToyFiles, run_dir: Path, **model: Any) -> RunConfig:
    sizes = {"num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 48, "hidden_size": 32}
    return RunConfig(
        run=RunSection(dir=str(run_dir)),
        model=ModelConfig(num_layers=1, init_std=0.1, **sizes, **model),
        data=DataConfig(
            train=str(files.train),
            tokenizer=str(files.tokenizer),
            template=str(files.template),
            pack_length=256,
            workers=1,
        ),
        algo=AlgoConfig(name="sft"),
        train=TrainConfig(steps=60, global_batch_packs=2, precision="fp32", seed=1),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-2, warmup_steps=5),
        log=LogConfig(tensorboard=False, progress=False, every_steps=1000),
    )


def test_an_answer_is_the_successor_of_the_latest_occurrence() -> None:
    """At the published size. The generator as printed marks 100% of its sequences with ids of -1, and answers 18% wrongly."""
    rng, counts, first = random.Random(0), [], []
    for _ in range(30):
        ids, answers = induction_sequence(rng, length=512, num_distinct=512, num_ids=7989)
        assert len(ids) == 512 and min(ids) >= 1 and max(ids) <= 7989
        assert all(a != b for a, b in pairwise(ids) if b not in answers)
        for place in answers:
            latest = max(i for i in range(place - 1) if ids[i] == ids[place - 1])
            assert ids[place] == ids[latest + 1]
        asked = {place - 1 for place in answers}
        for place in range(1, 511):  # a drawn id that was there before is always asked about
            seen = ids[place] in ids[:place] and place not in answers
            assert seen == (place in asked)
        counts.append(len(answers))
        first.append(answers[0])
    assert 112 < statistics.mean(counts) < 125
    assert 15 < statistics.median(first) < 45


def test_a_trigram_s_answer_is_the_table_s() -> None:
    rng = random.Random(0)
    table = trigram_table(rng, num_rules=40, num_ids=16)
    assert len(table) == 40
    num_answers = 0
    for _ in range(50):
        ids, answers = trigram_sequence(rng, table, length=32, num_ids=16)
        assert len(ids) == 32 and set(ids) <= set(range(1, 17))
        found = [i for i in range(2, 32) if (ids[i - 2], ids[i - 1]) in table]
        assert answers == found
        assert all(ids[i] == table[ids[i - 2], ids[i - 1]] for i in answers)
        num_answers += len(answers)
    assert num_answers > 200


def test_turns_put_answers_alone() -> None:
    assert turns([7, 3, 7, 3, 9, 9], [3, 4]) == [
        {"role": "user", "content": "7 3 7"},
        {"role": "assistant", "content": "3"},
        {"role": "assistant", "content": "9"},
    ]


@pytest.mark.parametrize("task", ["induction", "trigrams"])
def test_the_store_holds_the_ids_and_loss_on_answers_only(tmp_path: Path, task: str) -> None:
    if task == "induction":
        files = write_induction(tmp_path, seed=0, num_train=20, num_distinct=6, **SMALL)
    else:
        files = write_trigrams(tmp_path, seed=0, num_train=20, num_rules=12, **SMALL)
    prepared = prepare_data(config_for(files, tmp_path / "run"))
    assert prepared.tokenizer.vocab_size == 9
    assert prepared.store.num_documents == 20
    for document, line in enumerate(files.train.read_text().splitlines()):
        messages = json.loads(line)["messages"]
        words = [(word, m["role"]) for m in messages for word in m["content"].split()]
        part = prepared.store.part(2 * document + 1)
        assert part.tokens.tolist() == [int(word) for word, _ in words]
        assert part.loss.tolist() == [int(role == "assistant") for _, role in words]


def test_files_depend_on_their_arguments_alone(tmp_path: Path) -> None:
    def texts(folder: str, seed: int) -> list[str]:
        files = write_induction(tmp_path / folder, seed=seed, num_train=5, num_distinct=6, **SMALL)
        return [path.read_text() for path in (files.train, files.evaluation)]

    first, again, other = texts("a", 0), texts("b", 0), texts("c", 1)
    assert first == again and first[0] != other[0] and first[0] != first[1]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, int] = {"seed": 0, "num_train": 1, **SMALL}
    with pytest.raises(ValueError, match=r"num_distinct = 9.*num_ids = 8"):
        write_induction(tmp_path, num_distinct=9, **sizes)
    with pytest.raises(ValueError, match=r"num_rules = 65.*64 pairs"):
        write_trigrams(tmp_path, num_rules=65, **sizes)
    with pytest.raises(ValueError, match=r"eval.jsonl: 0 sequences"):
        write_induction(tmp_path, num_distinct=6, **{**sizes, "num_eval": 0})


def test_one_layer_learns_it_with_kv_shifting_only(tmp_path: Path, parallel: Parallel) -> None:
    """The paper's claim in a few seconds: 60 steps of one layer, everything else equal."""
    files = write_induction(tmp_path / "data", seed=0, num_train=1300, num_distinct=6, **SMALL)
    losses = {}
    for kv_shift in (True, False):
        run_dir = tmp_path / str(kv_shift)
        start = {"kv_shift": True, "kv_shift_init": "random"} if kv_shift else {}
        Trainer(config_for(files, run_dir, **start), parallel).train()
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        losses[kv_shift] = statistics.mean(row["loss"] for row in rows[-5:])
    assert losses[True] < 0.5 * losses[False]


def test_the_readme_shows_the_results() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "kv_shift_induction.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_scalars_are_not_decayed(tmp_path: Path, parallel: Parallel) -> None:
    """A step without gradients: weight decay alone moves weights, and the scalars stay bit for bit."""
    files = write_induction(tmp_path / "data", seed=0, num_train=20, num_distinct=6, **SMALL)
    config = config_for(files, tmp_path / "run", kv_shift=True, kv_shift_init="random")
    config = replace(config, optimizer=OptimizerConfig(lr=0.1, weight_decay=0.5))
    trainer = Trainer(config, parallel)
    (chunk,) = trainer.chunks
    before = {name: weight.detach().clone() for name, weight in chunk.named_parameters()}
    trainer.ddp[0].zero_grad_buffer()
    trainer.schedule.step(10)
    trainer.optimizer.step()
    moved = {name for name, w in chunk.named_parameters() if not torch.equal(w, before[name])}
    scalars = {name for name in before if name.endswith(("k_mix_K2", "v_mix_K2"))}
    assert len(scalars) == 2 and not scalars & moved
    assert {name for name in before if "linear" in name} <= moved
    trainer.lock.release()
