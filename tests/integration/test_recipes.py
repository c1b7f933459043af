"""Recipes through the user's own launcher: `nova train` and `nova generate` in their own processes. `nova evaluate`: test_evaluate.py."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "dpo_hh_small.toml"
SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 96,
    "model.vocab_size": 400,
    "data.pack_length": 512,
    "data.max_length": 256,
    "train.steps": 6,
    "train.global_batch_packs": 2,
    "optimizer.warmup_steps": 2,
    "optimizer.lr": 1e-3,
}


def nova(*arguments: object, expect: int = 0) -> str:
    command = [sys.executable, "-m", "nova_sys.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def torchrun(nproc: int, module: str, *arguments: object) -> None:
    """What a user of many machines types, on one."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(nproc),
    ]
    command = [*launcher, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def settings(run_dir: Path, data: Path, **changes: object) -> list[str]:
    merged = {
        **SMALL,
        "run.dir": str(run_dir),
        "data.train": str(data),
        **{k.replace("__", "."): v for k, v in changes.items()},
    }
    return [
        part for key, value in merged.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preference pairs in the form of hh-rlhf: two whole transcripts with a common start."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"

    def say(speaker: str, low: int, high: int) -> str:
        words = (
            "".join(rng.choices("abcdefgh", k=rng.randint(1, 6)))
            for _ in range(rng.randint(low, high))
        )
        return f"\n\n{speaker}: " + " ".join(words)

    with path.open("w") as out:
        for _ in range(120):
            start = "".join(
                say("Human", 2, 12) + say("Assistant", 2, 12) for _ in range(rng.randint(0, 2))
            )
            start += say("Human", 2, 12)
            pair = {
                "chosen": start + say("Assistant", 1, 15),
                "rejected": start + say("Assistant", 16, 20),
            }
            out.write(json.dumps(pair) + "\n")
    return path


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory, dialogues: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    nova("train", RECIPE, *settings(run_dir, dialogues, checkpoint__every_steps=3))
    return run_dir


def test_run_folder_holds_what_is_promised(one_rank_run: Path) -> None:
    rows = records(one_rank_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for key in (
        "loss",
        "grad_norm",
        "lr",
        "reward_accuracy",
        "margin",
        "tokens_per_s",
        "pairs_per_s",
        "peak_gib",
        "fill",
    ):
        assert all(isinstance(row[key], (int, float)) for row in rows), key
    checkpoints = sorted(path.name for path in (one_rank_run / "checkpoints").iterdir())
    assert checkpoints == ["step_00000003", "step_00000006"]
    assert list((one_rank_run / "tensorboard").glob("events.*"))


def test_tensor_and_pipeline_parallel_run_has_the_same_losses(
    tmp_path: Path, dialogues: Path, one_rank_run: Path
) -> None:
    changes = {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True}
    nova("train", RECIPE, "--nproc", 4, *settings(tmp_path / "run", dialogues, **changes))
    for ours, theirs in zip(records(tmp_path / "run"), records(one_rank_run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_resumed_run_is_bit_identical(tmp_path: Path, dialogues: Path, one_rank_run: Path) -> None:
    """Stopped behind a checkpoint in the middle of an epoch, and started again with the same command."""
    import shutil

    run_dir = tmp_path / "run"
    shutil.copytree(one_rank_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    nova("train", RECIPE, *settings(run_dir, dialogues, checkpoint__every_steps=3))
    keys = (
        "step",
        "loss",
        "grad_norm",
        "lr",
        "margin",
        "chosen_logp",
        "rejected_logp",
        "num_pairs",
    )
    ours, theirs = (
        [{key: row[key] for key in keys} for row in records(d)] for d in (run_dir, one_rank_run)
    )
    assert ours == theirs
    weights = [d / "checkpoints" / "step_00000006" for d in (run_dir, one_rank_run)]
    assert weights_of(weights[0]) == weights_of(weights[1])


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, optimizer state included, as bytes."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in entries.items()
        if isinstance(m, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    assert any("exp_avg" in key for key in state)
    return {key: value.numpy().tobytes() for key, value in state.items()}


def test_another_run_in_the_folder_is_refused(one_rank_run: Path, dialogues: Path) -> None:
    changed = settings(one_rank_run, dialogues, train__seed=99)
    text = nova("train", RECIPE, *changed, expect=2)
    assert "holds another run" in text and "seed: 1234 there, 99 here" in text


def test_online_reference_gives_the_cached_losses(
    tmp_path: Path, dialogues: Path, one_rank_run: Path
) -> None:
    nova(
        "train",
        RECIPE,
        *settings(tmp_path / "run", dialogues, algo__reference="online", train__steps=3),
    )
    # the schedule's length differs with train.steps, but not the warm-up: the first three losses do not depend on it
    for ours, theirs in zip(records(tmp_path / "run"), records(one_rank_run)[:3], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_generate_continues_text(one_rank_run: Path) -> None:
    prompt = "\n\nHuman: abc\n\nAssistant:"
    text = nova("generate", one_rank_run, prompt, "--max-new-tokens", 4, "--text")
    assert text.startswith(prompt) and len(text.strip()) > len(prompt.strip())


def test_sft_then_dpo_from_its_checkpoint(tmp_path: Path, dialogues: Path) -> None:
    sft = settings(
        tmp_path / "sft", dialogues, algo__name="sft", train__steps=4, log__profile_steps=[3, 3]
    )
    nova("train", RECIPE, *sft)
    assert list((tmp_path / "sft" / "tensorboard").glob("*.pt.trace.json")), (
        "the profiled step left no trace"
    )
    losses = [row["loss"] for row in records(tmp_path / "sft")]
    assert losses[-1] < losses[0]
    dpo = settings(
        tmp_path / "dpo",
        dialogues,
        model__init_from=str(tmp_path / "sft"),
        parallel__tensor=2,
        train__steps=2,
        optimizer__warmup_steps=0,
    )
    torchrun(2, "nova_sys.train", RECIPE, *dpo)
    rows = records(tmp_path / "dpo")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    scratch = settings(
        tmp_path / "scratch",
        dialogues,
        data__tokenizer=str(tmp_path / "sft" / "tokenizer"),
        train__steps=1,
        optimizer__warmup_steps=0,
    )
    nova("train", RECIPE, *scratch)
    untrained = records(tmp_path / "scratch")[0]["chosen_logp"]
    assert rows[0]["chosen_logp"] > untrained + 1, (
        "the policy starts from the SFT weights, not from scratch"
    )


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path: Path, dialogues: Path) -> None:
    text = nova(
        "train",
        RECIPE,
        "--dry-run",
        "--nproc",
        4,
        *settings(tmp_path / "run", dialogues, parallel__tensor=2),
    )
    for fact in ("layout", "parameters", "packs per epoch", "steps", "memory ", " GiB = weights "):
        assert fact in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_mistakes_end_with_one_clear_message(tmp_path: Path, dialogues: Path) -> None:
    text = nova("train", RECIPE, *settings(tmp_path / "a", dialogues, train__stepz=3), expect=2)
    assert "train.steps" in text and "Traceback" not in text
    text = nova(
        "train",
        RECIPE,
        "--nproc",
        2,
        *settings(tmp_path / "b", tmp_path / "missing.jsonl"),
        expect=2,
    )
    assert "missing.jsonl" in text and "Traceback" not in text
