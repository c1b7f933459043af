"""The demo: align a small model from nothing on two CPU cores. Data, tokenizer, SFT, DPO, evaluation, report.

The two training runs go through the launcher and the recipes that every run uses; the rest is the public functions
`write_tasks`, `generate` and `evaluate_pairs`. Why DPO has something to repair here: nova_sys/data/tasks.py.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nova_sys.data.tasks import (
    DRAW,
    TaskFiles,
    check_answer,
    habitual_answer,
    right_answer,
    task_of,
    write_tasks,
)
from nova_sys.evaluate import evaluate_pairs
from nova_sys.generate import generate
from nova_sys.launcher import launch
from nova_sys.report import draw_report, print_report, read_metrics
from nova_sys.sampling import Sampling

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parents[1] / "launch" / "recipes"
NUM_SFT, NUM_PAIRS, NUM_EVAL = 40_000, 6_000, 450
MAX_NEW_TOKENS = (
    16  # the longest right answer, six letters with spaces, takes 13 and the end of text
)
SAMPLES_PER_TASK = 2


def run_demo(out: Path, *, seed: int = 0, overrides: Sequence[str] = ()) -> int:
    """Make data, train, evaluate and report under `out`; returns 0, or the exit code of the run that failed.

    A demo that was interrupted goes on where it stopped. Files: data/*.jsonl, sft/ and dpo/ (run folders with
    checkpoints and TensorBoard logs), report.json, report.png.

    Args:     seed: of the data and of both runs.   overrides: `key=value` for both recipes.
    Raises:   ValueError when the recipes are not there, or when `out` holds a demo with other settings.
    """
    if not RECIPES.is_dir():
        raise ValueError(
            f"no recipes in {RECIPES}: the demo runs from a checkout of the repository, not from an "
            "installed wheel; clone it and run `make demo` there"
        )
    seconds: dict[str, float] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written to ({error.strerror}); name a folder, there or new"
        ) from None
    with _timed("data", seconds):
        files = write_tasks(
            out / "data", seed=seed, num_sft=NUM_SFT, num_pairs=NUM_PAIRS, num_eval=NUM_EVAL
        )
    sft, dpo = out / "sft", out / "dpo"
    for name, recipe, nproc, settings in (
        ("sft", "demo_sft_cpu.toml", 1, {"data.train": files.sft, "run.dir": sft}),
        (
            "dpo",
            "demo_dpo_tp2_cpu.toml",
            2,
            {"data.train": files.pairs, "run.dir": dpo, "model.init_from": sft},
        ),
    ):
        changes = [f"{key}={json.dumps(str(path))}" for key, path in settings.items()]
        with _timed(name, seconds):
            code = _train(RECIPES / recipe, nproc, [*changes, f"train.seed={seed}", *overrides])
        if code:
            return code
    with _timed("evaluation", seconds):
        report = _evaluate(files, sft, dpo)
    report |= {"seed": seed, "seconds": seconds, "seconds_total": sum(seconds.values())}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_report(out / "report.png", report, read_metrics(sft), read_metrics(dpo))
    print_report(report, out)
    return 0


def _train(recipe: Path, nproc: int, settings: Sequence[str]) -> int:
    flags = [part for setting in settings for part in ("--set", setting)]
    with _gpus_hidden(when=0 < torch.cuda.device_count() < nproc):
        return launch("nova_sys.train", [str(recipe), *flags], nproc=nproc)


@contextmanager
def _gpus_hidden(*, when: bool) -> Iterator[None]:
    """Processes started inside see no GPU: two tensor-parallel ranks cannot share one, but run as well on the CPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if when:
        logger.info("demo: fewer GPUs than processes, so this part runs on the CPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    yield
    if when and before is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    elif when:
        os.environ["CUDA_VISIBLE_DEVICES"] = before or ""


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    logger.info("demo: %s", stage)
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 1)


def _evaluate(files: TaskFiles, sft: Path, dpo: Path) -> dict[str, Any]:
    """Both checkpoints on the held-out prompts; also the DPO checkpoint's rewards against the SFT one, its reference."""
    lines = files.evaluation.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    greedy = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    answers = {
        name: [c.text.strip() for c in generate(checkpoint, prompts, greedy)]
        for name, checkpoint in (("sft", sft), ("dpo", dpo))
    }
    report: dict[str, Any] = {"num_eval": len(prompts)}
    for name, checkpoint in (("sft", sft), ("dpo", dpo)):
        prefers = evaluate_pairs(checkpoint, files.evaluation).reward_accuracy
        report[name] = score(prompts, answers[name]) | {"prefers_chosen": prefers.mean}
    against_sft = evaluate_pairs(dpo, files.evaluation, sft)
    report["dpo"]["reward_accuracy"] = against_sft.reward_accuracy.mean
    report["dpo"]["margin"] = against_sft.margin.mean
    report["samples"] = [
        {
            "prompt": prompts[i],
            "right": right_answer(prompts[i]),
            **{name: answers[name][i] for name in answers},
        }
        for i in sample_places(prompts)
    ]
    return report


def score(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Shares of exact matches: of all prompts, by task, by whether the prompt tempts to the bad habit; and of answers that show it."""
    right = [check_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
    habits = [habitual_answer(prompt) for prompt in prompts]

    def accuracy(kept: Iterator[bool]) -> float:
        chosen = [ok for ok, keep in zip(right, kept, strict=True) if keep]
        return sum(chosen) / max(1, len(chosen))

    return {
        "accuracy": sum(right) / len(right),
        "by_task": {task: accuracy(task_of(p) == task for p in prompts) for task in DRAW},
        "tempting": accuracy(habit is not None for habit in habits),
        "not_tempting": accuracy(habit is None for habit in habits),
        "habitual": sum(a == h for a, h in zip(answers, habits, strict=True)) / len(right),
    }


def sample_places(prompts: Sequence[str]) -> list[int]:
    """The first few prompts of each task that tempt to its bad habit: chosen by the prompt, not by the answer."""
    places = []
    for task in DRAW:
        tempting = [
            i
            for i, p in enumerate(prompts)
            if task_of(p) == task and habitual_answer(p) is not None
        ]
        places += tempting[:SAMPLES_PER_TASK]
    return places
