"""Recipes in, checked configs out: TOML, `--set a.b=c`, and errors that name the remedy."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import TypeAdapter, ValidationError

from nova_sys import config as config_module
from nova_sys.config import RunConfig
from nova_sys.config_rules import broken_rules, profile_problems
from nova_sys.hf.config_json import fill_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS: dict[str, type] = {
    section.name: typing.get_type_hints(RunConfig)[section.name]
    for section in dataclasses.fields(RunConfig)
}
TYPES: dict[str, Any] = {  # "data.train" -> str | list[str]
    f"{section}.{field.name}": typing.get_type_hints(cls)[field.name]
    for section, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
}

MAX_BITS = 64
"""Of a whole number; TOML itself promises no more."""


@dataclass(frozen=True)
class FieldDoc:
    """One key of a recipe, in words."""

    key: str
    type: str
    default: str
    doc: str


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML recipe, applies `a.b=c` overrides (the last one wins), checks every type.

    A value of an override is TOML; what TOML cannot read is text, so `run.dir=runs/x` needs no
    quotes. Rules that tie fields together, or to the number of processes, are `check`'s. Where
    `model.init_from` is a Hugging Face folder, its config.json gives the fields of [model].

    Raises: ValueError that lists every problem found in the file and in the overrides.
    """
    return _checked(path, _read_text(Path(path)), overrides)


def config_from(overrides: Sequence[str], source: str | Path) -> RunConfig:
    """`load_recipe` of a recipe that holds nothing. source: what stands in messages as its path."""
    return _checked(source, "", overrides)


def _checked(path: str | Path, text: str, overrides: Sequence[str]) -> RunConfig:
    table = _parse_toml(Path(path), text)
    problems = [problem for override in overrides if (problem := _apply_override(table, override))]
    problems += fill_model(table)
    found = {**_remove_giants(table), **_remove_unknown(table)}
    config = None
    try:
        config = _adapter().validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        found |= _type_problems(error, table)
    overridden = {override.partition("=")[0].strip() for override in overrides}
    for key, problem in found.items():
        place = "in --set" if key in overridden else _place(path, text, key)
        problems.append(f"{problem} ({place})")
    if config is None or problems:
        raise ValueError(_listed(problems, f"in recipe {path}"))
    return config


def check(config: RunConfig, world_size: int) -> None:
    """Every rule that ties fields to each other or to the number of processes.

    Raises: ValueError that lists every broken rule with its numbers and what to change.
    """
    problems = broken_rules(config, world_size)
    if problems:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        where = f"in this config for {processes}"
        one = [f"{problems[0]} ({where})"]
        raise ValueError(_listed(problems if len(problems) > 1 else one, where))


def check_profile(config: RunConfig, num_steps: int) -> None:
    """Raises: ValueError when the run of so many steps never reaches `log.profile_steps`."""
    for problem in profile_problems(config, num_steps):
        raise ValueError(problem)


def to_toml(config: RunConfig) -> str:
    """The resolved config as TOML that `load_recipe` reads back equal; None is left out."""
    table = {
        section: {name: value for name, value in body.items() if value is not None}
        for section, body in dataclasses.asdict(config).items()
    }
    return tomli_w.dumps(table)


def describe_fields() -> list[FieldDoc]:
    """Every key of a recipe in the order of config.py, with the docstring that follows it there."""
    docs = _attribute_docs()
    return [
        FieldDoc(key, _type_text(hint), _default(key), docs.get(key, ""))
        for key, hint in TYPES.items()
    ]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")  # editors on Windows begin a file with a byte order mark
    except FileNotFoundError:
        problem = "there is no such file; give the path of a TOML recipe"
    except IsADirectoryError:
        problem = "this is a folder; give the path of a TOML file"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check the path and its permissions"
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problem = f"not UTF-8 text, byte 0x{error.object[error.start]:02x} in line {line}"
        problem = f"{problem}; a recipe is TOML, which is UTF-8: save it as such"
    raise ValueError(f"recipe {path}: {problem}")


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        line = re.search(r" \(at line (\d+), ", str(error))
        where = f"{path}:{line[1]}" if line else str(path)
        raise ValueError(f"recipe {where}: not valid TOML: {error}; correct that place") from None


def _place(path: str | Path, text: str, key: str) -> str:
    """`path:line` of `section.name`, or of a section. tomllib tells no lines: this looks for them."""
    section = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            section = header[1]
        assigned = re.match(r"\s*([\w.-]+)\s*=", line)
        here = f"{section}.{assigned[1]}".strip(".") if assigned else section
        if here == key:
            return f"{path}:{number}"
    return str(path)


def _apply_override(table: dict[str, Any], override: str) -> str | None:
    """Puts `a.b=c` into the table; returns what is wrong with its form, if anything."""
    if any("\ud800" <= character <= "\udfff" for character in override):  # bytes of the shell
        return f"--set {override!a}: must be UTF-8 text; rename the file or folder"
    key, equals, text = (part.strip() for part in override.partition("="))
    parts = key.split(".")
    if not equals or len(parts) != 2 or not all(parts):
        nearest = _nearest(key)
        remedy = f"did you mean {nearest}={text or 'VALUE'}?" if nearest else "as train.steps=100"
        return f"--set {override}: must read section.key=value; {remedy}"
    value = _parse_value(text)
    meant = (text[:1], text[-1:]) in (("[", "]"), ('"', '"'), ("'", "'")) or text[:2] in (
        '["',
        "['",
    )
    if value is text and meant:
        remedy = 'put texts in a list into quotes, such as ["a.jsonl", "b.jsonl"]'
        return f"--set {override}: must be valid TOML inside brackets and quotes; {remedy}"
    section = table.setdefault(parts[0], {})
    if isinstance(section, dict):
        section[parts[1]] = value
    return None


def _parse_value(text: str) -> Any:
    """The TOML value, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _listed(problems: list[str], where: str) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems {where}:", *(f"  {line}" for line in problems)])


def _remove_unknown(table: dict[str, Any]) -> dict[str, str]:
    """Takes out of `table` what no dataclass knows; the problem of each key taken out."""
    problems = {}
    for section, body in list(table.items()):
        if section in SECTIONS and isinstance(body, dict):
            unknown = [f"{section}.{name}" for name in body if f"{section}.{name}" not in TYPES]
            problems |= {key: _unknown_key(key, body.pop(key.partition(".")[2])) for key in unknown}
            continue
        del table[section]
        if section in SECTIONS:
            remedy = f"write [{section}] and its keys on lines of their own below it"
            problems[section] = f"{section} = {_show(body)}: must be a section; {remedy}"
        elif isinstance(body, dict) and body:
            problems |= {
                f"{section}.{name}": _unknown_key(f"{section}.{name}", value)
                for name, value in body.items()
            }
        else:
            problems[section] = _unknown_key(section, body)
    return problems


def _remove_giants(table: dict[str, Any], section: str = "") -> dict[str, str]:
    """Takes out whole numbers that no program can use; Python cannot even print the longest."""
    problems = {}
    for name, value in list(table.items()):
        key = f"{section}.{name}".strip(".")
        if isinstance(value, dict):
            problems |= _remove_giants(value, key)
        elif _holds_giant(value):
            del table[name]
            rule = f"a whole number has at most {MAX_BITS} bits; correct it"
            problems[key] = f"{key} is set to a larger number than can be read: {rule}"
    return problems


def _holds_giant(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_giant, value))
    return isinstance(value, int) and value.bit_length() > MAX_BITS


def _unknown_key(key: str, value: Any) -> str:
    section = key.partition(".")[0]
    if nearest := _nearest(key):
        remedy = f"did you mean {nearest}?"
    elif section in SECTIONS:
        names = (field.name for field in dataclasses.fields(SECTIONS[section]))
        remedy = f"the keys of [{section}] are {', '.join(names)}"
    else:
        remedy = f"the sections are {', '.join(SECTIONS)}; `nova keys` lists every key"
    return f"{key} = {_show(value)}: unknown key; {remedy}"


def _nearest(key: str) -> str | None:
    """The known key most like `key`: the same name elsewhere, else the likeliest misspelling."""
    name = key.rpartition(".")[2]
    same_name = [known for known in TYPES if known.endswith(f".{name}")]
    if same_name:
        return max(same_name, key=lambda known: SequenceMatcher(None, known, key).ratio())
    close = get_close_matches(key, TYPES, n=1, cutoff=0.7)
    if close:
        return close[0]
    names = {known.partition(".")[2]: known for known in TYPES}
    close = get_close_matches(name, names, n=1, cutoff=0.7)
    return names[close[0]] if close else None


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _type_problems(error: ValidationError, table: dict[str, Any]) -> dict[str, str]:
    # a union reports each of its members, a list each of its items: one line per key is enough
    keys = dict.fromkeys((str(item["loc"][0]), str(item["loc"][1])) for item in error.errors())
    problems = {}
    for section, name in keys:
        key, value = f"{section}.{name}", table[section][name]
        rule = f"must be {_type_text(TYPES[key])}"
        problems[key] = f"{key} = {_show(value)}: {rule}; {_type_remedy(key, value)}"
    return problems


def _type_remedy(key: str, value: Any) -> str:
    hint = TYPES[key]
    if typing.get_origin(hint) is Literal:
        close = get_close_matches(str(value), typing.get_args(hint), n=1)
        return f'did you mean "{close[0]}"?' if close else f"the default is {_default(key)}"
    unquoted = _parse_value(value) if isinstance(value, str) else value
    if isinstance(value, str) and _fits(unquoted, hint):
        return f"write it without quotes: {key} = {_show(unquoted)}"
    if not isinstance(value, (str, list, dict)) and _fits("", hint):
        return f'put it in quotes: {key} = "{_show(value)}"'
    if isinstance(value, str) and "[" in _example(key):
        return f"write it as a list: {key} = {_example(key)}"
    return f"for example {key} = {_example(key)}"


def _fits(value: Any, hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        return False
    return True


def _example(key: str) -> str:
    examples = {"data.train": '"data/*.jsonl.gz"', "log.profile_steps": "[10, 12]"}
    return examples.get(key) or _default(key)


def _default(key: str) -> str:
    section, _, name = key.partition(".")
    value = getattr(getattr(RunConfig(), section), name)
    return "" if value is None else _show(value)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _type_text(hint: Any) -> str:
    """A type in words: `str | list[str]` is "text or a list of text"."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in members)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(member) for member in members if member is not type(None))
    if origin is list:
        return f"a list of {_type_text(members[0])}"
    if origin is tuple and members[-1] is Ellipsis:
        return f"a list of {_type_text(members[0]).removeprefix('a ')}s"
    if origin is tuple:
        return f"a pair of {_type_text(members[0]).removeprefix('a ')}s"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]


def _attribute_docs() -> dict[str, str]:
    """ "data.train" -> the string literal that follows the field in config.py."""
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    section_of = {cls.__name__: section for section, cls in SECTIONS.items()}
    docs = {}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, cls.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                key = f"{section_of[cls.name]}.{field.target.id}"
                docs[key] = " ".join(str(after.value.value).split())
    return docs
