"""Bad data, templates, tokenizers, settings: each refused before the first step with what was seen, the rule and the remedy."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("small_run", Path(__file__).with_name("small_run.py"))
assert spec is not None and spec.loader is not None
small_run = importlib.util.module_from_spec(spec)
sys.modules["small_run"] = small_run  # dataclasses look there
spec.loader.exec_module(small_run)
nova, refuses, run = small_run.nova, small_run.refuses, small_run.run  # fixtures

Run = Any  # small_run.SmallRun
Refuses = Callable[..., str]
Says = tuple[str, str, str]
"""Parts of a refusal: what was seen, the rule, what to change."""

GOOD = '{"prompt": "Q", "chosen": " yes", "rejected": " no"}\n' * 24
CUT = GOOD[: GOOD.rindex(" no")]
GZIPPED = gzip.compress(GOOD.encode(), mtime=0)
JSON_LINES = "data must be JSON lines, plain or gzip"
OBJECT = "each line must be one JSON object"


def same(row: dict, count: int = 5) -> str:
    return "".join(json.dumps(row) + "\n" for _ in range(count))


def turns(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


IDENTICAL = same({"prompt": "a", "chosen": "b", "rejected": "b"})
EMPTY = same({"prompt": "a", "chosen": "", "rejected": "b"})
NO_START = same({"chosen": "once", "rejected": "never"})

# fmt: off
FILES: dict[str, tuple[str | bytes, int | None, Says]] = {  # content; line, 0 for some line
    "malformed": (GOOD + '{"prompt": }\n', 25, ("not valid JSON (Expecting value, character 12)", OBJECT, "Correct or remove the line")),
    "last line cut": (CUT, 24, ("Unterminated string", OBJECT, "Correct or remove the line")),
    "gzip cut": (GZIPPED[:-12], 0, ("damaged gzip data", "a .gz file must be complete", "Copy or download it again")),
    "gzip flipped": (GZIPPED[:-8] + b"0000" + GZIPPED[-4:], 0, ("damaged gzip data (CRC check failed", "must be complete", "download it again")),
    "empty": ("", None, ("no records in it", "a data file has at least one line", "Remove it or fill it")),
    "blank": ("\n \n", None, ("no records in it", "at least one line", "fill it")),
    "empty gzip": (gzip.compress(b"", mtime=0), None, ("no records in it", "at least one line", "fill it")),
    "parquet": (b"PAR1\x15\x04\x15\xff" + bytes(range(256)), 1, ("byte 9 of the line is 0x00", JSON_LINES, "may be Parquet")),
    "random": (bytes(range(255, 0, -1)), 1, ("byte 1 of the line is 0xff", JSON_LINES, "Convert the file")),
    "utf-16": (GOOD.encode("utf-16"), 1, ("is 0x00, not UTF-8 text", JSON_LINES, "may be UTF-16 text, first")),
    "latin-1": ('{"prompt": "\xe9"}'.encode("latin-1"), 1, ("byte 13 of the line is 0xe9", JSON_LINES, "another text encoding")),
    "zstandard": (b"\x28\xb5\x2f\xfd\x24\x00", 1, ("byte 6 of the line is 0x00", JSON_LINES, "may be Zstandard, first")),
    "json array": (json.dumps([{"prompt": "a"}]), 1, ("a JSON list", OBJECT, "jq -c '.[]'")),
    "pretty printed": (json.dumps([{"prompt": "a"}], indent=1), 1, ("not valid JSON", OBJECT, "one object per line")),
    "csv": ("prompt,chosen,rejected\n", 1, ("in 'prompt,chosen,rejected'", OBJECT, "Correct or remove")),
    "carriage returns": (GOOD.replace("\n", "\r"), 1, ("Extra data", OBJECT, "Correct or remove")),
    "nested too deep": ("[" * 100_000, 1, ("maximum recursion depth", OBJECT, "Correct or remove")),
    "huge number": ('{"a": ' + "1" * 5000 + "}", 1, ("Exceeds the limit", OBJECT, "Correct or remove")),
    "half a surrogate": ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', 1, ("surrogates not allowed", OBJECT, "Correct or remove")),
    "key twice": ('{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}', 1, ("the key 'chosen' occurs twice", OBJECT, "Correct or remove")),
    "other keys": ('{"question": "a", "answer": "b"}', 1, ("keys 'question', 'answer'", "a record must be one of", "Rename the keys")),
    "dialogue for DPO": (json.dumps({"messages": turns("a", "b")}), 1, ('a "messages" record', "needs a chosen and a rejected answer", 'algo.name = "sft"')),
    "unknown role": (json.dumps({"prompt": [{"role": "bot", "content": "a"}], "chosen": "b", "rejected": "c"}), 1, ("role 'bot'", "one of system, user", "Correct the role")),
    "image": (json.dumps({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "b", "rejected": "c"}), 1, ("content is a list", "must be a string or a list of text parts", "not supported")),
    "identical answers": (IDENTICAL, None, ("no usable record", "data.jsonl:1: chosen and rejected are the same; a pair must differ", "remove the line")),
    "empty answers": (EMPTY, None, ("no usable record", '"chosen" holds no answer; an answer must have text', "remove the line")),
    "no common start": (NO_START, None, ("no usable record", "must agree up to an assistant's turn", 'Give {"prompt", "chosen", "rejected"} instead')),
}
# fmt: on


@pytest.mark.parametrize("name", FILES)
def test_data_file(name: str, run: Run, refuses: Refuses) -> None:
    content, line, says = FILES[name]
    path = run.write("data.jsonl", content)
    message = refuses(*run.train(f"data.train={path}"), says=says)
    assert str(path) in message
    if line is not None:
        assert re.search(rf"{re.escape(str(path))}:{line or '[0-9]+'}: ", message)
    assert not (run.dir / "tokenizer").exists()  # a refused run leaves no tokenizer of bad data


# fmt: off
PATHS: dict[str, tuple[str, Says]] = {
    "missing": ("FOLDER/pears.jsonl", ("'FOLDER/pears.jsonl': no such file", "data files must exist", "Did you mean FOLDER/pairs.jsonl?")),
    "folder": ("FOLDER", ("this is a folder", "data must be files", "Try 'FOLDER/*.jsonl*'")),
    "no match": ("FOLDER/*.parquet", ("no file matches", "a glob must match", "Check the path")),
    "none": ("", ('data.train = ""', "must name at least one JSON-lines file", "--set data.train=PATH")),
    "pipe": ("/dev/null", ("a device or pipe", "must be regular files", "Write the data to a file")),
    "twice": ('["FOLDER/pairs.jsonl", "FOLDER/*.jsonl"]', ("it is there twice, through 'FOLDER/pairs.jsonl' and 'FOLDER/*.jsonl'", "would weigh double", "Name it once")),
    "name too long": ("x" * 300, ("File name too long", "data files must be readable", "Check the path")),
    "unreadable": ("/proc/self/mem", ("cannot be read (Input/output error)", "must be readable", "its permissions")),
    "list without quotes": ("[a.jsonl, b.jsonl]", ("--set data.train=[a.jsonl, b.jsonl]", "must be valid TOML inside brackets", '["a.jsonl", "b.jsonl"]')),
    "not UTF-8": ("caf\udce9.jsonl", ("'data.train=caf\\udce9.jsonl'", "must be UTF-8 text", "rename the file")),
}
# fmt: on


@pytest.mark.parametrize("name", PATHS)
def test_data_path(name: str, run: Run, refuses: Refuses) -> None:
    path, says = PATHS[name]
    train = run.train("data.train=" + path.replace("FOLDER", str(run.folder)))
    refuses(*train, says=says)


def test_file_without_permission(run: Run, refuses: Refuses) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    run.data.chmod(0)
    says = ("cannot be read (Permission denied)", "data files must be readable", "its permissions")
    refuses(*run.train(), says=says)
    run.recipe.chmod(0)
    refuses(*run.train(), says=("recipe", "cannot be read (Permission denied)", "permissions"))


def test_more_unusable_records_than_allowed(run: Run, refuses: Refuses, nova: Any) -> None:
    rows = same({"prompt": "a", "chosen": "b", "rejected": " "}, 1) + IDENTICAL + NO_START
    path = run.write("data.jsonl", GOOD + rows)
    seen = "11 of 35 records (31.4%) cannot be used"
    says = (seen, "data.max_skipped allows 5.0%", "or raise data.max_skipped")
    message = refuses(*run.train(f"data.train={path}"), says=says)
    for first in (
        f"1 empty_answer (first: {path}:25)",
        f"5 identical_answers (first: {path}:26)",
        f"5 no_common_start (first: {path}:31)",
    ):
        assert first in message
    settings = (f"data.train={path}", "data.max_skipped=0.4")
    assert nova("prepare", *run.train(*settings)[1:]).code == 0


# fmt: off
TEMPLATES: dict[str, tuple[str, Says]] = {
    "syntax": ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", ("t.jinja:2 does not compile (unexpected '}')", "must be Jinja2", "choose a built-in one: chatml")),
    "unknown variable": ("x\n\n{{ mesage.content }}", ("pairs.jsonl:1: the chat template FOLDER/t.jinja:3 failed ('mesage' is undefined)", "every dialogue must suit it", "choose another data.template")),
    "unknown variable, written": ("\n{{ sistem }} x", ("t.jinja:2 failed ('sistem' is undefined)", "must suit it", "the template")),
    "raise_exception": ("\n{{ raise_exception('no system turn') }}", ("pairs.jsonl:1: the chat template FOLDER/t.jinja:2 failed (no system turn) on turns: user", "must suit it", "Correct the data")),
    "endless": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ("t.jinja:1 failed (maximum recursion depth exceeded", "must suit it", "the template")),
    "huge": ("{{ 'a' * 10**14 }}", ("t.jinja:1 failed (MemoryError)", "must suit it", "the template")),
    "another file": ("{% include 'other.jinja' %}", ("failed (no loader", "must suit it", "the template")),
    "unmaskable": ("{% for m in messages %}{{ m.role if loop.last else '-' }}{{ m.content }}{% endfor %}", ("pairs.jsonl:1: the chat template FOLDER/t.jinja renders", "the loss mask would be a guess", "{% generation %} blocks")),
    "other prompt": ("{% for m in messages %}{% if m.role == 'user' %}{{ messages | length }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}", ("renders the prompt differently when an answer follows", "must be the start of the whole dialogue", "another data.template")),
    "no answer": ("{% for m in messages %}{{ m.role }}{% endfor %}", ("pairs.jsonl:1: the chat template FOLDER/t.jinja leaves out what the assistant says", "there would be nothing to learn", "Use another data.template")),
    "evil": ("{{ messages.__class__.__mro__ }}", ("access to attribute '__class__' of 'list' object is unsafe", "must suit it", "the template")),
}
# fmt: on


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name: str, run: Run, refuses: Refuses) -> None:
    text, says = TEMPLATES[name]
    path = run.write("t.jinja", text)
    refuses(*run.train(f"data.template={path}"), says=says)
    assert not (run.dir / "tokenizer").exists()


def test_template_that_is_none(run: Run, refuses: Refuses) -> None:
    rule = "it must be auto, none, chatml, dialogue, or a Jinja2 file"
    says = ("data.template is 'chatlm', which cannot be read", rule, "Correct the name or the path")
    refuses(*run.train("data.template=chatlm"), says=says)
    row = {"prompt": turns("a"), "chosen": "b", "rejected": "c"}
    path = run.write("turns.jsonl", same(row))
    train = run.train("data.template=none", f"data.train={path}")
    says = (f"{path}:1: the record has turns", "turns need a template", 'data.template to "auto"')
    refuses(*train, says=says)


def word_level(**vocabulary: int) -> dict:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    as_json = json.loads(model.to_str())
    as_json["model"]["vocab"].update(vocabulary)
    return as_json


def config(**values: object) -> dict[str, object]:
    return {"tokenizer.json": word_level(), "tokenizer_config.json": values}


# fmt: off
TOKENIZERS: dict[str, tuple[dict[str, Any], Says]] = {
    "more ids than rows": ({"tokenizer.json": word_level(maybe=5)}, ("the tokenizer has 6 ids", "the model needs a row for each", "Raise model.vocab_size, or set it to 0")),
    "an id far beyond": ({"tokenizer.json": word_level(maybe=4_000_000_000)}, ("its largest id is 4,000,000,000", "ids must be below 4,194,304", "Download or export it again")),
    "text it cannot spell": ({"tokenizer.json": {**word_level(), "model": {**word_level()["model"], "vocab": {"a": 0}, "unk_token": "?"}}}, ("pairs.jsonl:1: the tokenizer fails on the text", "an unknown token, for every text", "choose another data.tokenizer")),
    "no tokenizer": ({"tokenizer.json": {}}, ("cannot be read", "must be a SentencePiece model or a tokenizer.json", "Download or export it again")),
    "not JSON": ({"tokenizer.json": "x"}, ("cannot be read", "must be a SentencePiece model or a tokenizer.json", "again")),
    "not a model": ({"tokenizer.model": "x"}, ("cannot be read", "must be a SentencePiece model", "again")),
    "empty model": ({"tokenizer.model": ""}, ("cannot be read", "must be a SentencePiece model", "again")),
    "nothing": ({"readme": ""}, ("has neither tokenizer.json nor tokenizer.model", "it needs one", "Point data.tokenizer to a .model file")),
    "EOS unknown": (config(eos_token="</s>"), ("eos_token is '</s>'", "both must agree", "Correct the name or add the token")),
    "config no object": ({"tokenizer.json": word_level(), "tokenizer_config.json": []}, ("tokenizer_config.json is not a JSON object", "must be", "again")),
    "template no text": (config(chat_template=5), ("chat_template in tokenizer_config.json is neither", "a text nor a list", "again")),
    "template broken": (config(chat_template="\n{% for"), ("the chat template of the tokenizer:2 does not compile", "must be Jinja2", "choose a built-in one")),
}
# fmt: on


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(name: str, run: Run, refuses: Refuses) -> None:
    files, says = TOKENIZERS[name]
    for file, content in files.items():
        run.write(f"tok/{file}", content if isinstance(content, str) else json.dumps(content))
    train = run.train(f"data.tokenizer={run.folder}/tok", "model.vocab_size=3")
    refuses(*train, says=says)
    assert not (run.dir / "tokenizer").exists()


def test_tokenizer_that_is_not_there(run: Run, refuses: Refuses) -> None:
    says = ("tokenizer /nowhere does not exist", "is a SentencePiece .model file", "Check the path")
    refuses(*run.train("data.tokenizer=/nowhere"), says=says)
    says = ("cannot train a tokenizer of 100 pieces", "it needs", "Raise model.vocab_size")
    refuses(*run.train("model.vocab_size=100"), says=says)


def test_prompts_without_tokens(run: Run, refuses: Refuses) -> None:
    """No BOS and no prompt: the first token of each answer, often the only one that differs, could not be learned."""
    run.write("tok/tokenizer.json", json.dumps(word_level()))
    path = run.write("data.jsonl", same({"prompt": "", "chosen": "yes", "rejected": "no"}))
    settings = (f"data.train={path}", f"data.tokenizer={run.folder}/tok", "model.vocab_size=0")
    says = (f"{path}:1: the prompt has no tokens", "predict an answer's first one", "with BOS")
    refuses(*run.train(*settings), says=says)


def test_bad_line_behind_much_good_data(run: Run, refuses: Refuses) -> None:
    """Far enough back that other processes read it."""
    good = (json.dumps({"prompt": "Q " * 400, "chosen": "yes", "rejected": "no"}) + "\n") * 6400
    path = run.write("data.jsonl", good + '{"prompt": "Q", "chosen": "yes"}\n' + good[:10_000])
    run.write("tok/tokenizer.json", json.dumps(word_level()))
    settings = (f"data.train={path}", f"data.tokenizer={run.folder}/tok", "data.workers=2")
    train = run.train(*settings, "model.vocab_size=0")
    says = (f"{path}:6401: keys 'prompt', 'chosen'", "a record must be one of", "Rename the keys")
    refuses(*train, says=says)
    assert not list((run.dir / "cache").iterdir())  # nothing of a refused build is kept
