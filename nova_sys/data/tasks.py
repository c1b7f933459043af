"""Verifiable toy tasks for the demo: adding, sorting and reversing, with right and subtly wrong answers, as JSON lines.

    add      "47+38="              "85"         habit: the carry is forgotten           "75"
    sort     "sort 7 3 9 3"        "3 3 7 9"    habit: an item that repeats is written once  "3 7 9"
    reverse  "reverse a p q r s"   "s r q p a"  habit: from five letters on, the last two change places  "s r q a p"

What the files hold, and why preference optimisation has something real to repair in them:

- `sft.jsonl`, {"messages": [user, assistant]}. Written as if by people with bad habits: an answer to a prompt that tempts
  to a habit (almost half of all prompts) shows it with probability `HABIT_RATE`, so a quarter of all answers are wrong. A model that imitates this text well imitates the habits well, too: no amount of this data removes them.
- `pairs.jsonl`, {"prompt", "chosen", "rejected"}. The chosen answer is right. The rejected one shows the habit where the
  prompt tempts to one (with probability `HABIT_SHARE`), and otherwise an accidental slip: off by one or ten, two
  neighbours changed, an item missing or written twice, and the like. So most pairs compare two answers that the imitating model both finds likely.
- `eval.jsonl`, same format as the pairs, no prompt twice. None of its problems occurs in the other files, not even with
  the numbers in another order: a problem's canonical form decides on which side of the split it lies.

The order and content of all three depend on the seed alone.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HABIT_RATE = 0.55
"""Probability that an answer in the SFT file shows the bad habit its prompt tempts to."""
HABIT_SHARE = 0.6
"""Probability that a rejected answer shows that habit instead of an accidental slip."""
HELD_OUT_OF = 10
"""One problem in so many is held out for evaluation."""
HABIT_LETTERS = 5
"""Reversing so many letters or more tempts to the habit."""
SFT_ROUND = ("add", "reverse", "sort", "add", "reverse")
"""The tasks of the SFT file's lines take turns in this order: sorting is learned from the fewest examples."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MAX_DRAWS = 20_000  # draws for one fresh held-out prompt before the task counts as exhausted


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """The three files that `write_tasks` makes."""

    sft: Path
    pairs: Path
    evaluation: Path


def _draw_add(rng: random.Random) -> str:
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}="


def _draw_sort(rng: random.Random) -> str:
    return "sort " + " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(3, 4)))


def _draw_reverse(rng: random.Random) -> str:
    return "reverse " + " ".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 6)))


DRAW: dict[str, Callable[[random.Random], str]] = {
    "add": _draw_add,
    "sort": _draw_sort,
    "reverse": _draw_reverse,
}
"""Task name -> a function that draws a prompt."""


def task_of(prompt: str) -> str:
    """The name of the task a prompt belongs to, a key of `DRAW`; ValueError for a text that is no prompt of ours."""
    words = prompt.split()
    if len(words) == 1 and words[0].endswith("="):
        operands = words[0][:-1].split("+")
        if len(operands) == 2 and all(operand.isdecimal() for operand in operands):
            return "add"
    if len(words) > 1 and words[0] == "sort" and all(word.isdecimal() for word in words[1:]):
        return "sort"
    if len(words) > 1 and words[0] == "reverse":
        return "reverse"
    raise ValueError(f"not a task: {prompt!r}; write '47+38=', 'sort 7 3 9' or 'reverse a b c'")


def right_answer(prompt: str) -> str:
    """The one right answer to a prompt of ours."""
    task = task_of(prompt)
    if task == "add":
        first, second = _operands(prompt)
        return str(first + second)
    items = prompt.split()[1:]
    return " ".join(sorted(items, key=int) if task == "sort" else items[::-1])


def check_answer(prompt: str, answer: str) -> bool:
    """True when `answer`, without spaces around it, is the right answer to `prompt`, character by character."""
    return answer.strip() == right_answer(prompt)


def habitual_answer(prompt: str) -> str | None:
    """The wrong answer that a bad habit gives to this prompt (see the head of this file); None where none applies."""
    task = task_of(prompt)
    if task == "add":
        first, second = _operands(prompt)
        return str(first + second - 10) if first % 10 + second % 10 > 9 else None
    items = right_answer(prompt).split()
    if task == "sort":
        once = list(dict.fromkeys(items))
        return " ".join(once) if len(once) < len(items) else None
    if len(items) < HABIT_LETTERS or items[-1] == items[-2]:
        return None
    return " ".join([*items[:-2], items[-1], items[-2]])


def accidental_answer(prompt: str, rng: random.Random) -> str:
    """A random small slip: a sum off by one or ten; two neighbours changed, one written in the other's place, an item
    missing, or one written twice."""
    right = right_answer(prompt)
    if task_of(prompt) == "add":
        return str(int(right) + rng.choice([-10, -1, 1, 10]))
    items = right.split()
    i = rng.randrange(len(items))
    j = min(max(i + rng.choice([-1, 1]), 0), len(items) - 1)
    slip = rng.choice(["changed", "replaced", "missing", "twice"])
    if slip in ("changed", "replaced") and items[i] != items[j]:
        items[i], items[j] = items[j], items[i] if slip == "changed" else items[j]
    elif slip == "missing":
        del items[i]
    else:
        items.insert(i, items[i])
    return " ".join(items)


def write_tasks(
    folder: Path, *, seed: int, num_sft: int, num_pairs: int, num_eval: int
) -> TaskFiles:
    """Write `sft.jsonl`, `pairs.jsonl` and `eval.jsonl` into `folder`. The tasks take turns line by line.

    Args:     folder is made if missing; files of these names are replaced. num_*: lines per file.
    Raises:   ValueError when a count is below 1, or when `num_eval` asks for more prompts than are held out.
    """
    for name, count in (("num_sft", num_sft), ("num_pairs", num_pairs), ("num_eval", num_eval)):
        if count < 1:
            raise ValueError(f"{name} = {count}: each file needs at least one line; give 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    files = TaskFiles(
        sft=folder / "sft.jsonl", pairs=folder / "pairs.jsonl", evaluation=folder / "eval.jsonl"
    )
    rng = random.Random(f"sft {seed}")
    _write(files.sft, (_conversation(p, rng) for p in _prompts(rng, seed, num_sft, SFT_ROUND)))
    rng = random.Random(f"pairs {seed}")
    _write(files.pairs, (_pair(p, rng) for p in _prompts(rng, seed, num_pairs, list(DRAW))))
    rng = random.Random(f"eval {seed}")
    _write(files.evaluation, (_pair(p, rng) for p in _held_out_prompts(rng, seed, num_eval)))
    return files


def _operands(prompt: str) -> tuple[int, int]:
    first, second = prompt.strip()[:-1].split("+")
    return int(first), int(second)


def _is_held_out(prompt: str, seed: int) -> bool:
    """Same side for all prompts that pose one problem: `47+38=` and `38+47=`, `sort 1 2 3` and `sort 3 1 2`."""
    task = task_of(prompt)
    items = prompt[:-1].split("+") if task == "add" else prompt.split()[1:]
    canonical = items if task == "reverse" else sorted(items)
    return zlib.crc32(f"{seed} {task} {canonical}".encode()) % HELD_OUT_OF == 0


def _prompts(rng: random.Random, seed: int, count: int, tasks: Sequence[str]) -> Iterator[str]:
    """Training prompts, the tasks taking turns; prompts may repeat, as in any large file."""
    for i in range(count):
        draw = DRAW[tasks[i % len(tasks)]]
        prompt = draw(rng)
        while _is_held_out(prompt, seed):
            prompt = draw(rng)
        yield prompt


def _held_out_prompts(rng: random.Random, seed: int, count: int) -> Iterator[str]:
    names, seen = list(DRAW), set[str]()
    for i in range(count):
        name = names[i % len(names)]
        for _ in range(_MAX_DRAWS):
            prompt = DRAW[name](rng)
            if prompt not in seen and _is_held_out(prompt, seed):
                break
        else:
            raise ValueError(
                f"num_eval = {count}: after {len(seen)} prompts no fresh one was found for {name!r}; "
                "the held-out problems are used up, so ask for fewer"
            )
        seen.add(prompt)
        yield prompt


def _conversation(prompt: str, rng: random.Random) -> dict[str, object]:
    habitual = habitual_answer(prompt)
    wrong = habitual is not None and rng.random() < HABIT_RATE
    answer = habitual if wrong else right_answer(prompt)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def _pair(prompt: str, rng: random.Random) -> dict[str, object]:
    habitual = habitual_answer(prompt)
    if habitual is None or rng.random() >= HABIT_SHARE:
        rejected = accidental_answer(prompt, rng)
    else:
        rejected = habitual
    return {"prompt": prompt, "chosen": right_answer(prompt), "rejected": rejected}


def _write(path: Path, records: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
