"""Prompts to generate from: plain text, one per line, or JSON lines in the shapes of the training data.

A file whose first character is `{` is JSON lines; other keys are ignored:

    {"prompt": text | turns, "tools": [...]}    also a pair with its answers
    {"messages": turns, "tools": [...]}         up to where the assistant is to speak
    {"chosen": ..., "rejected": ...}            whole dialogues: what both begin with
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nova_sys.data.formats import block_objects, parse_record, parse_tools, parse_turns
from nova_sys.data.lines import read_blocks
from nova_sys.data.records import Message, Source, TextPair, TurnPair


@dataclass(frozen=True)
class Prompt:
    content: str | list[Message]
    where: str
    """What messages call it: `prompt 3`, `prompts.jsonl:7`."""
    tools: list[Any] | None = None

    def as_turn(self) -> Prompt:
        """A text as a user's turn."""
        if isinstance(self.content, str):
            return Prompt([{"role": "user", "content": self.content}], self.where, self.tools)
        return self


def read_prompts(path: Path, name: str | None = None) -> list[Prompt]:
    """The prompts of a file, plain or gzip, in order. A line of text is a prompt as it stands; blank lines are skipped.

    name: what messages call the file, its path unless given.
    Raises: ValueError for a file that cannot be read or holds no prompt, and for a line that is none.
    """
    name = name or str(path)
    try:
        blocks = [replace(block, path=name) for block in read_blocks(path)]
    except OSError as error:
        raise ValueError(
            f"{name}: cannot be read ({error.strerror}); prompts are a text file or JSON lines. Check the path"
        ) from None
    text = _decode(b"".join(block.data for block in blocks), name)
    if text.lstrip().startswith("{"):
        return [_parse(value, source) for block in blocks for source, value in block_objects(block)]
    if _is_array(text):
        raise ValueError(
            f"{name}: a JSON list; prompts are a text file or JSON lines. Write the list's elements one per line (jq -c '.[]')"
        )
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [Prompt(line, f"{name}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ValueError(f"{name}: no prompts in it; give one per line, or JSON lines")
    return prompts


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
        if b"\0" in data:  # is UTF-8, but no text
            at = data.index(b"\0")
            raise UnicodeDecodeError("utf-8", data, at, at + 1, "a zero byte")
        return text
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8 text; prompts are a text file or JSON lines. "
            "Convert the file"
        ) from None


def _is_array(text: str) -> bool:
    """All of the text, or its first line, is a JSON list: `[INST] hello` is a prompt."""
    start = text.lstrip()
    if not start.startswith("["):
        return False
    for part in (start, start.split("\n", 1)[0]):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(part)
            return True
    return False


def _parse(value: Any, source: Source) -> Prompt:
    keys = set(value) if isinstance(value, dict) else set()
    if "prompt" in keys and isinstance(value["prompt"], str):
        return Prompt(value["prompt"], str(source), parse_tools(value, source))
    key = "prompt" if "prompt" in keys else "messages"
    if key in keys:
        turns = parse_turns(value[key], source, key)
        if turns[-1]["role"] == "assistant":
            raise ValueError(
                f'{source}: "{key}" ends with an assistant\'s turn; a prompt ends where the assistant is to speak. Remove that turn'
            )
        return Prompt(turns, str(source), parse_tools(value, source))
    if {"chosen", "rejected"} <= keys:
        pair = parse_record(value, source, "pairs")
        assert isinstance(pair, TextPair | TurnPair)
        tools = pair.tools if isinstance(pair, TurnPair) else None
        return Prompt(pair.prompt, str(source), tools)
    seen = f"keys {', '.join(map(repr, sorted(keys)[:8])) or 'none'}" if keys else f"{value!r:.60}"
    raise ValueError(
        f'{source}: {seen}; a prompt is a JSON object with "prompt", "messages", or "chosen" and "rejected". Rename the keys'
    )
