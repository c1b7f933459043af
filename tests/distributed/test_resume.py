"""A run that was stopped and continued is the run that was not: bit for bit on the same layout, to rounding on another one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from nova_kernels.testing import run_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "dpo_hh_small.toml"
SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 300,
    "model.kv_shift": True,
    "data.pack_length": 128,
    "data.max_length": 128,
    "train.steps": 10,
    "train.global_batch_packs": 4,
    "optimizer.lr": 1e-3,
    "optimizer.eps": 1e-4,  # of a gradient's size: else rounding of nearly zero ones moves weights
    "optimizer.warmup_steps": 2,
    "log.tensorboard": False,
    "log.progress": False,
    "checkpoint.every_steps": 0,
}
TP2_PP2 = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True}
FOURS = {
    "model.num_layers": 4,
    "model.num_kv_heads": 4,
    # Layers of two shapes: each has tensors of its own in a checkpoint.
    "model.sliding_window": 16,
    "model.window_layers": [1, 2],
    "model.window_heads": 8,
    "train.steps": 6,
}  # for 4 ranks of each kind
SAVED = "fours-tp2-pp2"
RESUMED = {"one": {}, "dp4": {}, "tp4": {"parallel.tensor": 4}, "pp4": {"parallel.pipeline": 4}}
TIMES = {"tokens_per_s", "tokens_per_s_per_gpu", "pairs_per_s", "step_time_s", "data_wait_ms"}
TIMES |= {"mfu", "peak_gib"}
Part = tuple[str, dict[str, Any], int]
"""Run folder, settings, and the number of steps after which a signal comes (0: none does; `EPOCH`: the last steps of the first)."""
EPOCH = -1


def train_parts(rank: int, folder: str, parts: list[Part]) -> None:
    """`run_ranks` worker: trains each part from its start to its end, one after the other in the same processes, with everything built
    anew. The signal comes to the last rank, within a step. A run of RESUMED begins as a copy of SAVED."""
    from nova_sys.config_io import load_recipe
    from nova_sys.parallel import parallel_run
    from nova_sys.stopping import stop_signals
    from nova_sys.trainer import Trainer

    for name, changes, stop_after in parts:
        data = {"data.train": f"{folder}/pairs.jsonl", "data.cache_dir": f"{folder}/cache"}
        settings = {**SMALL, **data, **changes, "run.dir": f"{folder}/{name}"}
        config = load_recipe(RECIPE, [f"{k}={json.dumps(v)}" for k, v in settings.items()])
        if rank == 0 and name.startswith("fours-to-"):
            shutil.copytree(f"{folder}/{SAVED}", f"{folder}/{name}")
        with stop_signals() as stop, parallel_run(config.parallel, seed=1) as parallel:
            trainer = Trainer(config, parallel, stop)
            one_step = trainer._one_step
            if stop_after == EPOCH:
                stop_after = trainer.loader.packs_per_epoch // config.train.global_batch_packs

            def step_with_signal(
                step: int, *, after: int = stop_after, work: Any = one_step
            ) -> None:
                if after and step + 1 == after and rank == parallel.world_size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                work(step)

            trainer._one_step = step_with_signal
            trainer.train()
            assert bool(stop_after) == stop.agreed


def write_pairs(path: Path, count: int) -> None:
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        made = ("".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(high))
        return " ".join([*made][: rng.randint(low, high)])

    with path.open("w") as out:
        for _ in range(count):
            pair = {"prompt": f"Q: {words(1, 12)}\nA: "}
            pair |= {"chosen": words(1, 9), "rejected": words(1, 9)}
            out.write(json.dumps(pair) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run below. Each job is started once and trains its parts in turn; a part with a name that was there continues it."""
    folder = tmp_path_factory.mktemp("resume")
    write_pairs(folder / "pairs.jsonl", 40)
    same = {"data.tokenizer": f"{folder}/dp2/tokenizer"}
    cp = {**same, "parallel.context": 2}
    pp, online = {**same, **TP2_PP2}, {**same, "algo.reference": "online"}
    fours = {**same, **FOURS}
    often = {**same, "checkpoint.every_steps": 2, "checkpoint.asynchronous": False}
    jobs: list[tuple[int, list[Part]]] = [
        (
            2,
            [
                ("dp2", {}, 0),
                ("dp2-dp2", same, 3),
                ("dp2-dp2", same, 0),
                ("dp2-dp4", same, 3),
                ("cp-one", cp, 3),
            ],
        ),
        (4, [("pp", pp, 0), ("pp-pp", pp, 3), ("pp-pp", pp, 0), ("pp-one", pp, 3)]),
        (4, [("dp2-dp4", same, 0), (SAVED, {**fours, **TP2_PP2}, 3)]),
        (
            4,
            [(f"fours-to-{to}", {**fours, **how}, 0) for to, how in RESUMED.items() if to != "one"],
        ),
        (1, [("fours-to-one", fours, 0), ("fours", fours, 0)]),
        (1, [("one", same, 0), ("one-one", same, 3), ("one-one", often, 7), ("one-one", same, 0)]),
        (1, [("one-edges", same, 1), ("one-edges", same, EPOCH), ("one-edges", same, 0)]),
        (1, [("mixed", online, 3), ("mixed", same, 7), ("mixed", online, 0), ("pp-one", same, 0)]),
        (1, [("cp-one", same, 0)]),
    ]
    for num_ranks in (2, 4, 1):
        parts = [part for ranks, some in jobs if ranks == num_ranks for part in some]
        run_ranks(train_parts, num_ranks, str(folder), parts, timeout_s=400)
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def tensors(run: Path, step: int = 10) -> dict[str, np.ndarray]:
    """Weights, optimizer and random states of the last checkpoint."""
    reader = FileSystemReader(run / "checkpoints" / f"step_{step:08d}")
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in entries.items()}
    load(state, storage_reader=reader, no_dist=True)
    return {key: value.numpy() for key, value in state.items()}


@pytest.mark.parametrize(
    ("stopped", "whole"),
    [("one-one", "one"), ("one-edges", "one"), ("dp2-dp2", "dp2"), ("pp-pp", "pp")],
)
def test_same_layout_bit_for_bit(folder: Path, stopped: str, whole: str) -> None:
    """In the middle of the first epoch, and (on one rank) again in the second; after the first step, and again at the epoch's end."""
    ours, theirs = rows(folder / stopped), rows(folder / whole)
    assert [row["step"] for row in theirs] == [*range(1, 11)]
    assert theirs[3]["epoch"] < 1 < theirs[6]["epoch"]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == expected
    a, b = tensors(folder / stopped), tensors(folder / whole)
    assert a.keys() == b.keys() and any("exp_avg" in key for key in a)
    assert [key for key in a if not np.array_equal(a[key], b[key])] == []


@pytest.mark.parametrize("stopped", ["pp-one", "cp-one", "dp2-dp4", "mixed"])
def test_another_layout_to_rounding(folder: Path, stopped: str) -> None:
    """TP2 x PP2 -> one rank, CP2 -> one rank, DP2 -> DP4; also from one reference mode to the other and back. The same documents in every step."""
    assert_same_to_rounding(folder / stopped, folder / "one", step=10)


@pytest.mark.parametrize("to", RESUMED)
def test_one_checkpoint_on_four_layouts(folder: Path, to: str) -> None:
    """Saved at TP2 x PP2: the next steps, weights and moments are those of a run that never stopped and never moved."""
    layout = json.loads((folder / SAVED / "checkpoints/step_00000003/nova.json").read_text())
    assert layout["world_size"] == 4 and len(rows(folder / SAVED)) == 3
    assert_same_to_rounding(folder / f"fours-to-{to}", folder / "fours", step=6)


def assert_same_to_rounding(run: Path, whole: Path, *, step: int) -> None:
    for row, expected in zip(rows(run), rows(whole), strict=True):
        for key in ("step", "epoch", "fill", "num_pairs", "num_tokens", "lr", "skipped"):
            assert row.get(key) == expected.get(key), key
        for key in ("loss", "grad_norm", "chosen_logp", "rejected_logp"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), (row["step"], key)
    a, b = tensors(run, step), tensors(whole, step)
    assert any("exp_avg_sq" in key for key in b)
    for key in (key for key in b if not key.startswith("random.")):
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-6, err_msg=key)
