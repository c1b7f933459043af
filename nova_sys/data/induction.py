"""The toy tasks of KV shifting's paper (arXiv 2411.19574, appendix D) as data files that `nova train` reads: induction, and 3-grams.

    induction  ids drawn at random; when one comes up that was there before, its last successor must follow: 7 3 9 4 | 3 -> 9
    trigram    a fixed table of pairs with one successor each, planted among random ids: nothing is to be found in the context

Only answers carry loss: the ids that the ids before them determine. A line is a dialogue, whose assistant turns are the answers:

    {"messages": [{"role": "user", "content": "7 3 9 4 3"}, {"role": "assistant", "content": "9"}, ...]}

`write_induction` and `write_trigrams` make a folder with `train.jsonl`, `eval.jsonl`, `template.jinja`, which joins the turns by
spaces and adds nothing, and `tokenizer/`, in which every id is a word of its own. The paper's induction generator, run as printed,
emits the mark of an id without successor (-1) as a token, lets a third of the sequences grow one id too long, and forgets the
successor of an answer; here the successor is noted whenever an id is drawn, an answer is one of the ids that were drawn, and a sequence is cut to its
length. What the files hold depends on their arguments alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{{ ' ' }}"
    "{% endfor %}"
)
UNKNOWN = "<unk>"
FIRST_ID = 1
"""Id 0 is `UNKNOWN`, which no file holds."""
PLANTED = 0.2
"""Probability that a free place of a 3-gram sequence begins a pair of the table."""

Sequence = tuple[list[int], list[int]]
"""Ids, and the places of those that are answers."""


@dataclass(frozen=True, kw_only=True)
class ToyFiles:
    """What `nova train` is given: data.train, data.template, data.tokenizer; and the held-out sequences."""

    train: Path
    evaluation: Path
    template: Path
    tokenizer: Path


def induction_sequence(
    rng: random.Random, *, length: int, num_distinct: int, num_ids: int
) -> Sequence:
    """`length` ids of 1 .. num_ids, from `num_distinct` drawn for this sequence.

    An id is drawn that differs from the last one. Was it there before, the id that followed it the last time follows again: an answer.
    """
    pool = rng.sample(range(FIRST_ID, FIRST_ID + num_ids), num_distinct)
    ids: list[int] = []
    answers: list[int] = []
    successor: dict[int, int] = {}
    while len(ids) < length:
        drawn = rng.choice(pool)
        while ids and drawn == ids[-1]:
            drawn = rng.choice(pool)
        if ids:
            successor[ids[-1]] = drawn
        ids.append(drawn)
        if drawn in successor:
            answers.append(len(ids))
            ids.append(successor[drawn])
    return ids[:length], [place for place in answers if place < length]


def trigram_table(
    rng: random.Random, *, num_rules: int, num_ids: int
) -> dict[tuple[int, int], int]:
    """`num_rules` pairs of ids, and the id that always follows each."""
    pairs = rng.sample(range(num_ids * num_ids), num_rules)
    return {
        (FIRST_ID + pair // num_ids, FIRST_ID + pair % num_ids): rng.randint(FIRST_ID, num_ids)
        for pair in pairs
    }


def trigram_sequence(
    rng: random.Random, table: dict[tuple[int, int], int], *, length: int, num_ids: int
) -> Sequence:
    """Random ids with pairs of the table planted among them; behind a pair, planted or met by chance, its successor: an answer."""
    pairs = list(table)
    ids: list[int] = []
    answers: list[int] = []
    planned: list[int] = []
    while len(ids) < length:
        follows = table.get((ids[-2], ids[-1])) if len(ids) > 1 else None
        if follows is not None:
            answers.append(len(ids))
            planned = []
            ids.append(follows)
            continue
        if not planned and rng.random() < PLANTED:
            planned = list(rng.choice(pairs))
        ids.append(planned.pop(0) if planned else rng.randint(FIRST_ID, num_ids))
    return ids, answers


def write_induction(
    folder: Path,
    *,
    seed: int,
    num_train: int,
    num_eval: int,
    length: int,
    num_distinct: int,
    num_ids: int,
) -> ToyFiles:
    """The induction task's files. num_distinct: ids that one sequence draws from; num_ids: ids of the language.

    Raises: ValueError when a sequence cannot be drawn so.
    """
    if not 2 <= num_distinct <= num_ids:
        raise ValueError(
            f"num_distinct = {num_distinct}: a sequence draws from at least 2 and at most num_ids = {num_ids} ids; choose it between"
        )

    def draw(rng: random.Random) -> Sequence:
        return induction_sequence(rng, length=length, num_distinct=num_distinct, num_ids=num_ids)

    return _write(folder, draw, f"induction {seed}", num_train, num_eval, num_ids)


def write_trigrams(
    folder: Path,
    *,
    seed: int,
    num_train: int,
    num_eval: int,
    length: int,
    num_rules: int,
    num_ids: int,
) -> ToyFiles:
    """The 3-gram task's files; both hold the same table. Raises: ValueError when there are not so many pairs."""
    if not 1 <= num_rules <= num_ids * num_ids:
        raise ValueError(
            f"num_rules = {num_rules}: {num_ids} ids make {num_ids * num_ids} pairs, and a rule needs one; choose fewer rules"
        )
    table = trigram_table(random.Random(f"table {seed}"), num_rules=num_rules, num_ids=num_ids)

    def draw(rng: random.Random) -> Sequence:
        return trigram_sequence(rng, table, length=length, num_ids=num_ids)

    return _write(folder, draw, f"trigram {seed}", num_train, num_eval, num_ids)


def turns(ids: list[int], answers: list[int]) -> list[dict[str, str]]:
    """The sequence as turns: the ids up to each answer are the user's, the answer is the assistant's. What follows the last
    answer is left out, since nothing there is learned."""
    messages: list[dict[str, str]] = []
    at = 0
    for place in answers:
        if place > at:
            messages.append({"role": "user", "content": " ".join(map(str, ids[at:place]))})
        messages.append({"role": "assistant", "content": str(ids[place])})
        at = place + 1
    return messages


def _write(
    folder: Path,
    draw: Callable[[random.Random], Sequence],
    name: str,
    num_train: int,
    num_eval: int,
    num_ids: int,
) -> ToyFiles:
    folder.mkdir(parents=True, exist_ok=True)
    files = ToyFiles(
        train=folder / "train.jsonl",
        evaluation=folder / "eval.jsonl",
        template=folder / "template.jinja",
        tokenizer=folder / "tokenizer",
    )
    for path, count in ((files.train, num_train), (files.evaluation, num_eval)):
        if count < 1:
            raise ValueError(f"{path.name}: {count} sequences; each file needs at least one")
        rng = random.Random(f"{name} {path.name}")
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for messages in _drawn(draw, rng, count):
                file.write(json.dumps({"messages": messages}) + "\n")
    files.template.write_text(TEMPLATE, encoding="utf-8")
    files.tokenizer.mkdir(exist_ok=True)
    text = json.dumps(tokenizer_json(num_ids))
    (files.tokenizer / "tokenizer.json").write_text(text, encoding="utf-8")
    return files


def _drawn(
    draw: Callable[[random.Random], Sequence], rng: random.Random, count: int
) -> Iterator[list[dict[str, str]]]:
    """`count` sequences that have an answer; a short one may have none."""
    while count:
        messages = turns(*draw(rng))
        if messages:
            count -= 1
            yield messages


def tokenizer_json(num_ids: int) -> dict[str, object]:
    """A tokenizer of the `tokenizers` library in which the word "17" is token 17."""
    vocab = {UNKNOWN: 0} | {str(i): i for i in range(FIRST_ID, FIRST_ID + num_ids)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN},
    }
