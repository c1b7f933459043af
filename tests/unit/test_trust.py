"""docs/trust.md promises nothing without a test: every test that it names exists, and every section names some."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "trust.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


def functions_of(path: Path) -> set[str]:
    functions = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in functions if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_named_tests_exist(path: str) -> None:
    there = functions_of(ROOT / path)
    assert [name for of, name in NAMED if of == path and name not in there] == []


def test_every_section_names_a_test() -> None:
    _, *sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    assert len(sections) > 5
    for section in sections:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", section), section.splitlines()[0]
        paragraphs = re.split(r"^(?=- )", section, flags=re.MULTILINE)[1:]
        promises = [p.split("\n\n")[0] for p in paragraphs]
        assert [p for p in promises if "::test_" not in p] == [], "a promise without a test"
