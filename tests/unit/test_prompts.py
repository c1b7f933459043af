"""Prompts of text files and JSON lines, and what is no file of prompts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nova_sys.data.prompts import Prompt, read_prompts


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone \r\n\n  two [\u4e2d]\nthree".encode())
    found = read_prompts(path)
    assert [p.content for p in found] == ["one ", "  two [\u4e2d]", "three"]
    assert [p.where for p in found] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert found[0].as_turn().content == [{"role": "user", "content": "one "}]


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    answer = {"role": "assistant", "content": "yes"}
    tools = [{"name": "add"}]
    lines = [
        {"prompt": "a\nb", "chosen": "x", "rejected": "y"},
        {"prompt": turns, "tools": tools},
        {"messages": turns},
        {"chosen": "\n\nHuman: q\n\nAssistant: 1", "rejected": "\n\nHuman: q\n\nAssistant: 2"},
        {"chosen": [*turns, answer], "rejected": [*turns, {**answer, "content": "no"}]},
    ]
    path = tmp_path / "prompts.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert read_prompts(path) == [
        Prompt("a\nb", f"{path}:1"),
        Prompt(turns, f"{path}:2", tools),
        Prompt(turns, f"{path}:3"),
        Prompt("\n\nHuman: q\n\nAssistant:", f"{path}:4"),
        Prompt(turns, f"{path}:5"),
    ]
    assert read_prompts(path)[2].as_turn().content == turns


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n \n", "prompts.txt: no prompts in it"),
        (b"ok\n\xff\xfe", "prompts.txt:2: byte 0xff is not UTF-8 text"),
        (b"ok\na\0b", "prompts.txt:2: byte 0x00 is not UTF-8 text"),
        (b'[{"prompt": "a"},\n {"prompt": "b"}]', "prompts.txt: a JSON list; .* one per line"),
        (b'["a", "b"]\n["c"]\n', "prompts.txt: a JSON list; .* one per line"),
        (b'{"prompt": "a"}\n{"prompt": ', "prompts.txt:2: not valid JSON"),
        (b'{"text": "a"}', "prompts.txt:1: keys 'text'; a prompt is a JSON object"),
        (b'{"prompt": "a"}\n[1]', r"prompts.txt:2: \[1\]; a prompt is a JSON object"),
        (b'{"prompt": 3}', 'prompts.txt:1: "prompt" is a number'),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            'prompts.txt:1: "messages" ends with an assistant\'s turn',
        ),
        (None, "prompts.txt: cannot be read"),
    ],
)
def test_a_prompt_file_that_is_none(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    of_stdin = message.replace("prompts.txt", "standard input")
    with pytest.raises(ValueError, match=f"^{of_stdin}") as told:
        read_prompts(path, "standard input")
    assert str(tmp_path) not in str(told.value)


def test_a_text_that_begins_with_a_bracket_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("[INST] say a [/INST]\n[1] is a quote\n")
    assert [prompt.content for prompt in read_prompts(path)] == path.read_text().splitlines()
