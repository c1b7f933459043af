"""JSON lines, plain or gzip, to records. Every refusal names file and line, what was seen, the
rule, and a remedy.

Accepted, one object per line, formats may be mixed, other keys are ignored:

    {"prompt": text | turns, "chosen": text | turns, "rejected": text | turns}
    {"chosen": transcript, "rejected": transcript}   hh-rlhf text or lists of turns; common start
    {"messages": turns, "tools": [...]}              SFT only
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from nova_sys.data.lines import Block, block_lines, read_blocks
from nova_sys.data.records import (
    ASSISTANT,
    DataError,
    DialogueRecord,
    Message,
    Source,
    TextPair,
    TurnPair,
    UnusableRecord,
)

Kind = Literal["sft", "pairs"]
"""What an algorithm learns from: one token sequence with loss on spans of it, or a chosen and a
rejected answer."""

ROLES = ("system", "user", "assistant", "tool")
_SHAPES = (
    'one of {"prompt", "chosen", "rejected"}, {"chosen", "rejected"} with whole dialogues, '
    '{"messages": [...]}'
)


def _refuse(source: object, seen: str, rule: str, remedy: str) -> NoReturn:
    raise DataError(f"{source}: {seen}; {rule}. {remedy}")


def expand_files(patterns: str | Sequence[str]) -> list[Path]:
    """Paths and globs to existing files: in the order given, the matches of a glob sorted by
    name."""
    files: dict[Path, tuple[Path, str]] = {}  # by what they resolve to
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            for path in _matches(pattern):
                with open(path, "rb") as stream:
                    stream.read(1)  # permissions do not tell all (network file systems, /proc)
                _, other = files.setdefault(path.resolve(), (path, pattern))
                if files[path.resolve()][0] is not path:
                    seen = f"it is there twice, through {other!r} and {pattern!r}"
                    rule = "a file is read once, or its records would weigh double"
                    _refuse(path, seen, rule, "Name it once; if they are to weigh double, copy it.")
        except OSError as error:
            seen, rule = f"cannot be read ({error.strerror})", "data files must be readable"
            _refuse(repr(pattern), seen, rule, "Check the path and its permissions.")
    if not files:
        _refuse(
            "the list of data files", "it is empty", "at least one is needed", "Set data.train."
        )
    return [path for path, _ in files.values()]


def _matches(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))  # leaves an unknown user's ~name as it is
    if path.is_file():
        return [path]
    if pattern and glob.has_magic(pattern):
        matches = sorted(Path(m) for m in glob.glob(str(path), recursive=True))
        matches = [m for m in matches if m.is_file()]
        if not matches:
            _refuse(repr(pattern), "no file matches", "a glob must match", "Check the path.")
        return matches
    if path.is_dir() and pattern:
        rule = "data must be files"
        _refuse(repr(pattern), "this is a folder", rule, f"Try '{pattern}/*.jsonl*'.")
    if path.exists() and pattern:
        rule = "data must be regular files, since they are read more than once"
        _refuse(repr(pattern), "a device or pipe", rule, "Write the data to a file.")
    near = difflib.get_close_matches(
        path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], n=1
    )
    start = "" if path.is_absolute() else f" It begins in {Path.cwd()}."
    remedy = f"Did you mean {path.parent / near[0]}?" if near else f"Check the path.{start}"
    _refuse(repr(pattern), "no such file", "data files must exist", remedy)


def read_objects(path: Path, file: int = 0) -> Iterator[tuple[Source, Any]]:
    """The JSON value of each line that is not blank, with its place."""
    num_objects = 0
    for block in read_blocks(path, file):
        for source, value in block_objects(block):
            num_objects += 1
            yield source, value
    if num_objects == 0:
        refuse_empty(path)


def refuse_empty(path: Path) -> NoReturn:
    _refuse(path, "no records in it", "a data file has at least one line", "Remove it or fill it.")


def block_objects(block: Block) -> Iterator[tuple[Source, Any]]:
    """The JSON value of each line of a block that is not blank, with its place."""
    for source, line in block_lines(block):
        try:
            value = _JSON.decode(line)
            if "\\u" in line:
                json.dumps(
                    value, ensure_ascii=False
                ).encode()  # half a surrogate pair cannot be tokenised
        except (ValueError, RecursionError) as error:
            said = (
                f"{error.msg}, character {error.pos + 1}"
                if isinstance(error, json.JSONDecodeError)
                else error
            )
            _refuse(
                source,
                f"not valid JSON ({said}) in {line[:60]!r}",
                "each line must be one JSON object",
                "Correct or remove the line; a file of many-line JSON must be rewritten one "
                "object per line.",
            )
        yield source, value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; Python's own reader would silently keep the last of two."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def parse_record(value: Any, source: Source, kind: Kind) -> DialogueRecord | TextPair | TurnPair:
    """One JSON value to a record; UnusableRecord if it is well formed but teaches nothing, else
    ValueError."""
    if not isinstance(value, dict):
        _refuse(
            source,
            f"a JSON {_name(value)}",
            "each line must be one JSON object",
            "Write a list's elements one per line (jq -c '.[]').",
        )
    if "chosen" in value and "rejected" in value:
        if "prompt" in value:
            return _check_pair(_pair_with_prompt(value, source), source, kind)
        return _check_pair(_pair_of_dialogues(value, source), source, kind)
    if "messages" in value:
        return _dialogue(value, source, kind)
    keys = ", ".join(repr(k) for k in list(value)[:8]) or "none"
    _refuse(source, f"keys {keys}", f"a record must be {_SHAPES}", "Rename the keys.")


def _name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _dialogue(value: dict[str, Any], source: Source, kind: Kind) -> DialogueRecord:
    if kind == "pairs":
        _refuse(
            source,
            'a "messages" record',
            "preference training needs a chosen and a rejected answer",
            'Use algo.name = "sft" for this file, or give pairs.',
        )
    messages = parse_turns(value["messages"], source, "messages")
    if not any(_says_something(m) for m in messages if m["role"] == "assistant"):
        raise UnusableRecord(
            "no_assistant_turn",
            f"{source}: no assistant turn with content or tool calls; loss falls on assistant "
            "turns only. Add the answer or remove the line.",
        )
    return DialogueRecord(messages, parse_tools(value, source))


def parse_tools(value: dict[str, Any], source: Source) -> list[Any] | None:
    tools = value.get("tools")
    if tools is not None and not isinstance(tools, list):
        _refuse(
            source,
            f'"tools" is a {_name(tools)}',
            "it must be a list of JSON schemas",
            "Wrap it in [ ].",
        )
    return tools or None


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def parse_turns(value: Any, source: Source, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        seen = f'"{key}" is {"an empty list" if value == [] else f"a {_name(value)}"}'
        _refuse(
            source, seen, "it must be a list of turns", 'A turn is {"role": ..., "content": ...}.'
        )
    return [_turn(turn, source, f"{key}[{i}]") for i, turn in enumerate(value)]


def _turn(turn: Any, source: Source, where: str) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        seen = f"role {turn.get('role')!r}" if isinstance(turn, dict) else f"a {_name(turn)}"
        rule = f"a turn is an object whose role is one of {', '.join(ROLES)}"
        _refuse(source, f"{where} has {seen}", rule, "Correct the role.")
    content = turn.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    calls = turn.get("tool_calls")
    if content is None and (calls or turn["role"] == "assistant"):
        content = ""
    if not isinstance(content, str):
        rule = "content must be a string or a list of text parts"
        _refuse(
            source,
            f"{where}.content is a {_name(content)}",
            rule,
            "Images and audio are not supported.",
        )
    if not calls:
        return {**{k: v for k, v in turn.items() if k != "tool_calls"}, "content": content}
    return {**turn, "content": content, "tool_calls": _calls(calls, source, f"{where}.tool_calls")}


def _calls(calls: Any, source: Source, where: str) -> list[Any]:
    """Tool calls, with arguments that are JSON in a string opened: templates write them as JSON
    themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        _refuse(
            source, f"{where} is not a list of objects", "a call is an object", "Wrap it in [ ]."
        )
    opened = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            rule = 'a call is {"function": {"name": ..., "arguments": ...}}'
            _refuse(source, f"{where} has a call without a function name", rule, "Add the name.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # Free text, and JSON that cannot be tokenised: the template gets it as it is.
            with contextlib.suppress(ValueError, RecursionError):
                opened_arguments = _JSON.decode(arguments)
                json.dumps(opened_arguments, ensure_ascii=False).encode()
                function = {**function, "arguments": opened_arguments}
        opened.append({**call, "function": function} if "function" in call else function)
    return opened


def _pair_with_prompt(value: dict[str, Any], source: Source) -> TextPair | TurnPair:
    prompt, chosen, rejected = value["prompt"], value["chosen"], value["rejected"]
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(value[key], (str, list)):
            rule = "it must be a string or a list of turns"
            _refuse(source, f'"{key}" is a {_name(value[key])}', rule, "Correct the record.")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return TextPair(prompt, chosen, rejected)
    turns = (
        parse_turns(prompt, source, "prompt")
        if isinstance(prompt, list)
        else [{"role": "user", "content": prompt}]
    )
    return TurnPair(
        turns,
        _answer_turns(chosen, turns, source, "chosen"),
        _answer_turns(rejected, turns, source, "rejected"),
        parse_tools(value, source),
    )


def _answer_turns(answer: Any, prompt: list[Message], source: Source, key: str) -> list[Message]:
    """The answer's turns; a list that repeats the prompt at its start (as UltraFeedback's do) loses
    that start."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if not answer:
        return []
    turns = parse_turns(answer, source, key)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if turns and turns[0]["role"] != "assistant":
        _refuse(
            source,
            f'"{key}" starts with a turn of role {turns[0]["role"]!r}',
            "an answer starts with an assistant turn (the prompt's turns may be repeated before "
            "it)",
            "Correct the record.",
        )
    return turns


def _pair_of_dialogues(value: dict[str, Any], source: Source) -> TextPair | TurnPair:
    chosen, rejected = value["chosen"], value["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = _common_length(chosen, rejected)
        marker = chosen.rfind(ASSISTANT, 0, common)
        if chosen == rejected:
            marker = chosen.rfind(ASSISTANT)
        if marker < 0:
            _no_common_start(
                source, f"share their first {common} characters, without {ASSISTANT!r}"
            )
        start = marker + len(ASSISTANT)
        return TextPair(chosen[:start], chosen[start:], rejected[start:])
    turns_a = parse_turns(chosen, source, "chosen")
    turns_b = parse_turns(rejected, source, "rejected")
    common = _common_length(turns_a, turns_b)
    for cut in range(min(common, len(turns_a) - 1, len(turns_b) - 1), 0, -1):
        if turns_a[cut]["role"] == turns_b[cut]["role"] == "assistant":
            return TurnPair(turns_a[:cut], turns_a[cut:], turns_b[cut:], parse_tools(value, source))
    _no_common_start(
        source, f"share their first {common} turns, with no assistant turn in both behind them"
    )


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    same, different = 0, min(len(a), len(b)) + 1  # bisection: slices compare at C speed
    while different - same > 1:
        middle = (same + different) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            different = middle
    return same


def _no_common_start(source: Source, seen: str) -> NoReturn:
    raise UnusableRecord(
        "no_common_start",
        f"{source}: chosen and rejected {seen}; whole dialogues must agree up to an assistant's "
        "turn. "
        'Give {"prompt", "chosen", "rejected"} instead, or remove the line.',
    )


def _check_pair(pair: TextPair | TurnPair, source: Source, kind: Kind) -> TextPair | TurnPair:
    """Refuses answers that are empty or equal. SFT looks at the chosen answer only."""
    for key in ("chosen", "rejected") if kind == "pairs" else ("chosen",):
        answer = getattr(pair, key)
        if isinstance(answer, str):
            # A transcript shows that someone judged a blank answer (hh-rlhf has some): keep it.
            empty = (
                not answer
                if isinstance(pair, TextPair) and pair.is_transcript
                else not answer.strip()
            )
        else:
            empty = not any(_says_something(m) for m in answer if m["role"] == "assistant")
        if empty:
            raise UnusableRecord(
                "empty_answer",
                f'{source}: "{key}" holds no answer; an answer must have text. '
                "Fill it or remove the line.",
            )
    if kind == "pairs" and pair.chosen == pair.rejected:
        raise UnusableRecord(
            "identical_answers",
            f"{source}: chosen and rejected are the same; a pair must differ. "
            "Correct or remove the line.",
        )
    return pair
