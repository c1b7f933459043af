"""The demo's tasks: right answers are right, wrong ones are wrong in the stated way and number, the split does not leak."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nova_sys.data.formats import parse_record, read_objects
from nova_sys.data.records import DialogueRecord, TextPair
from nova_sys.data.tasks import (
    DRAW,
    HABIT_RATE,
    HABIT_SHARE,
    accidental_answer,
    check_answer,
    habitual_answer,
    right_answer,
    task_of,
    write_tasks,
)

COUNTS = {"num_sft": 3000, "num_pairs": 1500, "num_eval": 300}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sft_pairs(path: Path) -> list[tuple[str, str]]:
    turns = [record["messages"] for record in _lines(path)]
    assert all([turn["role"] for turn in pair] == ["user", "assistant"] for pair in turns)
    return [(user["content"], assistant["content"]) for user, assistant in turns]


@pytest.mark.parametrize(
    ("prompt", "right", "habitual"),
    [
        ("47+38=", "85", "75"),
        ("41+38=", "79", None),
        ("95+95=", "190", "180"),
        ("sort 7 3 9 3", "3 3 7 9", "3 7 9"),
        ("sort 7 3 9 1", "1 3 7 9", None),
        ("sort 5 5 5", "5 5 5", "5"),
        ("reverse a p q r s", "s r q p a", "s r q a p"),
        ("reverse a p q r", "r q p a", None),
        ("reverse a a q r s", "s r q a a", None),  # changing equal letters changes nothing
    ],
)
def test_known_answers(prompt: str, right: str, habitual: str | None) -> None:
    assert right_answer(prompt) == right
    assert habitual_answer(prompt) == habitual
    assert check_answer(prompt, right)
    assert check_answer(prompt, f" {right}\n")
    assert not check_answer(prompt, right + "0")
    assert not check_answer(prompt, "")
    assert habitual is None or not check_answer(prompt, habitual)


@pytest.mark.parametrize(
    "text", ["", "sort", "reverse", "4+5", "a+b=", "1+2+3=", "sort 1 b", "hello there"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a task"):
        task_of(text)


@pytest.mark.parametrize("task", list(DRAW))
def test_slips_are_wrong_and_small(task: str) -> None:
    rng = random.Random(1)
    for _ in range(500):
        prompt = DRAW[task](rng)
        assert task_of(prompt) == task
        right, slip = right_answer(prompt), accidental_answer(prompt, rng)
        assert not check_answer(prompt, slip)
        if task == "add":
            assert abs(int(right) - int(slip)) in (1, 10)
        else:
            missing = len(right.split()) - len(slip.split())
            assert missing in (-1, 0, 1)
            changed = sum(a != b for a, b in zip(right.split(), slip.split(), strict=False))
            assert missing or changed <= 2


def test_files_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (
        write_tasks(tmp_path / name, seed=seed, **COUNTS)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for name in ("sft", "pairs", "evaluation"):
        text = getattr(first, name).read_bytes()
        assert text == getattr(again, name).read_bytes()
        assert text != getattr(other, name).read_bytes()


def test_sft_answers_are_wrong_at_the_stated_rate(tmp_path: Path) -> None:
    examples = _sft_pairs(write_tasks(tmp_path, seed=0, **COUNTS).sft)
    assert len(examples) == COUNTS["num_sft"]
    tempted = [(p, a) for p, a in examples if habitual_answer(p) is not None]
    assert all(check_answer(p, a) for p, a in examples if habitual_answer(p) is None)
    assert all(check_answer(p, a) or a == habitual_answer(p) for p, a in tempted)
    assert 0.4 < len(tempted) / len(examples) < 0.55  # "about half of all prompts"
    wrong = sum(not check_answer(p, a) for p, a in tempted) / len(tempted)
    assert abs(wrong - HABIT_RATE) < 0.05  # 4 standard deviations of 1,400 draws


@pytest.mark.parametrize("name", ["pairs", "evaluation"])
def test_pairs_hold_a_right_and_a_wrong_answer(tmp_path: Path, name: str) -> None:
    records = _lines(getattr(write_tasks(tmp_path, seed=0, **COUNTS), name))
    assert all(check_answer(r["prompt"], r["chosen"]) for r in records)
    assert not any(check_answer(r["prompt"], r["rejected"]) for r in records)
    tempted = [r for r in records if habitual_answer(r["prompt"]) is not None]
    share = sum(r["rejected"] == habitual_answer(r["prompt"]) for r in tempted) / len(tempted)
    assert HABIT_SHARE - 0.12 < share < HABIT_SHARE + 0.17  # an accident may equal the habit
    tasks = [task_of(r["prompt"]) for r in records]
    assert tasks == [list(DRAW)[i % len(DRAW)] for i in range(len(records))]


def test_no_evaluation_problem_occurs_in_training(tmp_path: Path) -> None:
    files = write_tasks(tmp_path, seed=5, **COUNTS)

    def problem(prompt: str) -> tuple[str, ...]:
        task = task_of(prompt)
        items = prompt.rstrip("=").split("+") if task == "add" else prompt.split()[1:]
        return (task, *(items if task == "reverse" else sorted(items)))

    evaluation = [record["prompt"] for record in _lines(files.evaluation)]
    assert len(set(evaluation)) == len(evaluation) == COUNTS["num_eval"]
    trained = {problem(prompt) for prompt, _ in _sft_pairs(files.sft)}
    trained |= {problem(record["prompt"]) for record in _lines(files.pairs)}
    assert not trained & {problem(prompt) for prompt in evaluation}


def test_files_are_in_formats_the_trainer_reads(tmp_path: Path) -> None:
    files = write_tasks(tmp_path, seed=0, num_sft=6, num_pairs=6, num_eval=6)
    sft = [parse_record(value, source, "sft") for source, value in read_objects(files.sft)]
    pairs = [parse_record(value, source, "pairs") for source, value in read_objects(files.pairs)]
    assert len(sft) == len(pairs) == 6
    assert all(isinstance(record, DialogueRecord) for record in sft)
    assert all(isinstance(record, TextPair) for record in pairs)


@pytest.mark.parametrize("count", ["num_sft", "num_pairs", "num_eval"])
def test_empty_files_are_refused(tmp_path: Path, count: str) -> None:
    with pytest.raises(ValueError, match=f"{count} = 0"):
        write_tasks(tmp_path, seed=0, **{**COUNTS, count: 0})


def test_too_many_evaluation_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held-out problems are used up"):
        write_tasks(tmp_path, seed=0, num_sft=1, num_pairs=1, num_eval=30_000)
